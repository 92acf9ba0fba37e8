-- The rows that are due are the only queue: the tables of the job library go.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE apps, keys, adoptions, reconciliations, campaigns IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 11';

DO $$ DECLARE
    object record;
BEGIN
    FOR object IN SELECT oid::regclass AS name FROM pg_class
        WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') AND relname LIKE 'river\_%' LOOP
        EXECUTE format('DROP TABLE %s CASCADE', object.name);
    END LOOP;
    FOR object IN SELECT oid::regprocedure AS name FROM pg_proc
        WHERE pronamespace = current_schema()::regnamespace AND proname LIKE 'river\_%' LOOP
        EXECUTE format('DROP FUNCTION %s', object.name);
    END LOOP;
    FOR object IN SELECT oid::regtype AS name FROM pg_type
        WHERE typnamespace = current_schema()::regnamespace AND typtype = 'e' AND typname LIKE 'river\_%' LOOP
        EXECUTE format('DROP TYPE %s', object.name);
    END LOOP;
END $$;

ALTER TABLE apps DROP COLUMN enqueued_at;
ALTER TABLE keys DROP COLUMN enqueued_at;
ALTER TABLE adoptions DROP COLUMN enqueued_at;
ALTER TABLE reconciliations DROP COLUMN enqueued_at;
ALTER TABLE campaigns DROP COLUMN enqueued_at;

-- 0 incident, 1 interactive, 2 bulk, 3 background. Callers share each.
ALTER TABLE keys RENAME COLUMN lane TO priority;
ALTER TABLE keys DROP CONSTRAINT keys_lane;
ALTER TABLE keys ADD CONSTRAINT keys_priority CHECK (priority BETWEEN 0 AND 3) NOT VALID;
ALTER TABLE keys ALTER COLUMN priority SET DEFAULT 1;
ALTER TABLE keys ADD COLUMN requested_by text COLLATE "C" NOT NULL DEFAULT 'worker';

DROP INDEX keys_in_work;
DROP INDEX keys_working;
CREATE INDEX keys_in_work ON keys (priority, requested_by, next_attempt_at) WHERE state IN ('creating', 'revoking');
CREATE INDEX apps_in_work ON apps (state, for_pool, next_attempt_at) WHERE state IN ('building', 'purging');
CREATE INDEX apps_awaited ON apps (next_attempt_at) WHERE state IN ('held', 'retained') AND pending AND NOT background
    AND (end_unknown_keys OR state = 'held' AND (tagging OR tagged_purge_after IS NOT NULL));
CREATE INDEX apps_removal_due ON apps ((greatest(purge_after, next_attempt_at))) WHERE state = 'retained';
