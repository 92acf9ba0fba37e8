-- All locks that this takes, before anything is changed, as in 000004.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE apps IN ACCESS EXCLUSIVE MODE NOWAIT;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

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
