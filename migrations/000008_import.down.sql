DROP INDEX apps_pending;
CREATE INDEX apps_pending ON apps (next_attempt_at) WHERE state = 'held' AND pending;
ALTER TABLE apps DROP COLUMN background;
DROP INDEX tenants_waiting;
CREATE INDEX tenants_waiting ON tenants (profile, state_since, id) WHERE state = 'provisioning';
ALTER TABLE tenants DROP COLUMN background;
