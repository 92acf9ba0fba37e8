-- Takes all locks before the first change, as in 000004.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE apps, keys, adoptions, reconciliations, campaigns, replicas IN ACCESS EXCLUSIVE MODE NOWAIT;
            LOCK TABLE audit_events IN SHARE MODE NOWAIT;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- The replica that has the lease: if it dies, its leases are free at once.
ALTER TABLE apps ADD COLUMN leased_by uuid;
ALTER TABLE keys ADD COLUMN leased_by uuid;
ALTER TABLE adoptions ADD COLUMN leased_by uuid;
ALTER TABLE reconciliations ADD COLUMN leased_by uuid;
ALTER TABLE campaigns ADD COLUMN leased_by uuid;
ALTER TABLE replicas ADD COLUMN leases_freed boolean NOT NULL DEFAULT false;

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

-- The audit log is listed in the order of the ids. A hash index makes each event more expensive the
-- more events have the same value; a B-tree with the id behind the value does not.
--
-- Only empty partitions get their indexes here. `migrate up` then builds those of the other partitions
-- concurrently, and drops the indexes that they replace: see internal/postgres/indexes.go.
DO $$
DECLARE
    part  regclass;
    used  boolean;
    made  text;
    new   record;
BEGIN
    FOR new IN SELECT * FROM (VALUES
        ('tenant', '(tenant_id, id) WHERE tenant_id IS NOT NULL'),
        ('actor', '(actor, id)'),
        ('action', '(action, id)'),
        ('app', '(app_id, id) WHERE app_id IS NOT NULL'),
        ('key', '(key_id, id) WHERE key_id IS NOT NULL'),
        ('request', '(request_id COLLATE "C", id) WHERE request_id IS NOT NULL')) AS new (name, definition)
    LOOP
        EXECUTE format('CREATE INDEX %I ON ONLY audit_events %s', 'audit_events_by_' || new.name, new.definition);
        FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass LOOP
            EXECUTE format('SELECT EXISTS (SELECT FROM %s)', part) INTO used;
            CONTINUE WHEN used;
            made := (SELECT relname FROM pg_class WHERE oid = part) || '_by_' || new.name;
            EXECUTE format('CREATE INDEX %I ON %s %s', made, part, new.definition);
            EXECUTE format('ALTER INDEX %I ATTACH PARTITION %I', 'audit_events_by_' || new.name, made);
        END LOOP;
    END LOOP;
END $$;

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
