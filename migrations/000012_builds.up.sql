-- Takes the lock before the first change, as in 000004.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE pools IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- without the lock
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- Since when a profile has a tenant that waits in the background, as waiting_from for other tenants.
ALTER TABLE pools ADD COLUMN importing_from timestamptz NOT NULL DEFAULT '-infinity';
