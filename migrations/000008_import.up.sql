-- Tenants that were signed up many at once, and that wait behind all others. They keep the mark
-- when they have their app: the pool is not kept for more of their like.
ALTER TABLE tenants ADD COLUMN background boolean NOT NULL DEFAULT false;

-- Who waits for an app, oldest first, and apart from each other those in the background.
DROP INDEX tenants_waiting;
CREATE INDEX tenants_waiting ON tenants (profile, background, state_since, id) WHERE state = 'provisioning';

-- The apps that they got, which are marked when nothing else is to be done.
ALTER TABLE apps ADD COLUMN background boolean NOT NULL DEFAULT false;
DROP INDEX apps_pending;
CREATE INDEX apps_pending ON apps (background, next_attempt_at) WHERE state = 'held' AND pending;
