-- The time of the next upstream call, and the number of failed calls in a row, are sequences. A row has a
-- version for each change, and all of them stay while a snapshot is held, as by a dump: after an hour each
-- reservation read 50,000 versions. A sequence has one.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE upstream_budget IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- without the lock
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- Older code reserves calls in the row: next to newer code that would double the rate.
CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 13';

-- Microseconds since 1970. Only who has locked the row of upstream_budget changes it. It goes back only if
-- the clock of the database does.
CREATE SEQUENCE upstream_slots MINVALUE 0 START 0 OWNED BY upstream_budget.only_row;
CREATE SEQUENCE upstream_failures MINVALUE 0 START 0 OWNED BY upstream_budget.only_row;
SELECT setval('upstream_slots', greatest(0, (extract(epoch FROM next_slot_at) * 1000000)::bigint)), setval('upstream_failures', failures) FROM upstream_budget;
ALTER TABLE upstream_budget
    DROP COLUMN next_slot_at,
    DROP COLUMN failures;
