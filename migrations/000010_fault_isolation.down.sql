CREATE OR REPLACE FUNCTION audit_events_make_partitions(months integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    first date;
    name  text;
    made  integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit_events_make_partitions'));
    FOR i IN 0..months LOOP
        first := (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => i))::date;
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM audit_events_other
            WHERE at >= first::timestamp AT TIME ZONE 'UTC' AND at < (first + interval '1 month') AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TABLE %I PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)', name,
            first::timestamp AT TIME ZONE 'UTC', (first + interval '1 month') AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON %I
            FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard()', name);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;

ALTER TABLE keys DROP COLUMN end_unconfirmed_since;
ALTER TABLE replicas DROP COLUMN pat;
DROP TABLE pat_checks;
