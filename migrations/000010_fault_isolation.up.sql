-- Partitions are attached, which needs no lock that stops inserts. Attaching locks the default
-- partition, which a dump reads: the function waits briefly, and is called again later. It runs with the
-- privileges of its owner, so that the role of the service need not own the table.
CREATE OR REPLACE FUNCTION audit_events_make_partitions(months integer) RETURNS integer LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    first date;
    name  text;
    made  integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit_events_make_partitions'));
    FOR i IN 0..least(months, 120) LOOP
        first := (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => i))::date;
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM audit_events_other
            WHERE at >= first::timestamp AT TIME ZONE 'UTC' AND at < (first + interval '1 month') AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING STORAGE)', name);
        EXECUTE format('CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON %I
            FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard()', name);
        EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name,
            first::timestamp AT TIME ZONE 'UTC', (first + interval '1 month') AT TIME ZONE 'UTC');
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;
DO $$ BEGIN
    EXECUTE format('ALTER FUNCTION audit_events_make_partitions(integer) SET search_path = %I, pg_temp', current_schema());
END $$;
ALTER FUNCTION audit_events_make_partitions(integer) SET lock_timeout = '100ms';

-- Checks of PATs that began since Clarifai refused the credential of a call. If the PAT passed, the
-- refusal concerned one app or key.
CREATE TABLE pat_checks (
    fingerprint    bytea PRIMARY KEY,
    checking_until timestamptz NOT NULL,                     -- until then one replica checks the PAT
    works_at       timestamptz NOT NULL DEFAULT '-infinity'  -- when the PAT last passed
);

-- Fingerprint of the PAT that a replica uses. A rejected PAT that no live replica uses has no effect.
ALTER TABLE replicas ADD COLUMN pat bytea;

-- When the end of a key was first expected and could not be confirmed; null if it never was.
ALTER TABLE keys ADD COLUMN end_unconfirmed_since timestamptz;
