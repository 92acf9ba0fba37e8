-- Takes all locks before the first change, as in 000004.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE apps, keys IN ACCESS EXCLUSIVE MODE NOWAIT;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- `migrate up` then builds new indexes concurrently, and writes what older rows lack: see
-- internal/postgres/indexes.go and backfill.go.

-- Changes of the number of tenants. The number is the sum of n. Each change is a row of its own, or
-- sign-ups would wait for each other; the sweep adds the rows up. The row without a state shows that the
-- tenants from before this table were counted.
CREATE TABLE tenant_counts (
    profile    text NOT NULL,
    revision   text NOT NULL, -- of the profile, that the app has; '' without an app
    state      text NOT NULL,
    background boolean NOT NULL,
    n          bigint NOT NULL
);

CREATE FUNCTION tenant_counts_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tenant_counts (profile, revision, state, background, n)
    SELECT profile, coalesce((SELECT profile_revision FROM apps WHERE id = t.app_id), ''), state, background, count(*)
    FROM inserted t GROUP BY 1, 2, 3, 4;
    RETURN NULL;
END $$;
CREATE TRIGGER tenants_inserted AFTER INSERT ON tenants REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION tenant_counts_inserted();

CREATE FUNCTION tenant_counts_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tenant_counts (profile, revision, state, background, n)
    VALUES (OLD.profile, coalesce((SELECT profile_revision FROM apps WHERE id = OLD.app_id), ''), OLD.state, OLD.background, -1);
    IF TG_OP = 'UPDATE' THEN
        INSERT INTO tenant_counts (profile, revision, state, background, n)
        VALUES (NEW.profile, coalesce((SELECT profile_revision FROM apps WHERE id = NEW.app_id), ''), NEW.state, NEW.background, 1);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER tenants_changed AFTER UPDATE OF profile, app_id, state, background ON tenants
    FOR EACH ROW WHEN ((OLD.profile, OLD.app_id, OLD.state, OLD.background) IS DISTINCT FROM (NEW.profile, NEW.app_id, NEW.state, NEW.background))
    EXECUTE FUNCTION tenant_counts_changed();
CREATE TRIGGER tenants_removed AFTER DELETE ON tenants FOR EACH ROW EXECUTE FUNCTION tenant_counts_changed();

-- Who changes the revision of a tenant's app locks the tenant first.
CREATE FUNCTION tenant_counts_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tenant_counts (profile, revision, state, background, n)
    SELECT profile, c.revision, state, background, c.n
    FROM tenants, (VALUES (OLD.profile_revision, -1), (NEW.profile_revision, 1)) AS c (revision, n) WHERE app_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER apps_revision AFTER UPDATE OF profile_revision ON apps
    FOR EACH ROW WHEN (OLD.profile_revision <> NEW.profile_revision AND NEW.tenant_id IS NOT NULL)
    EXECUTE FUNCTION tenant_counts_revision();

-- Counts all tenants again. The transaction must be of the isolation level repeatable read: changes that
-- its snapshot does not have then stay in the table.
CREATE FUNCTION tenant_counts_recount() RETURNS void LANGUAGE sql AS $$
    DELETE FROM tenant_counts;
    INSERT INTO tenant_counts (profile, revision, state, background, n)
    SELECT t.profile, coalesce(a.profile_revision, ''), t.state, t.background, count(*)
    FROM tenants t LEFT JOIN apps a ON a.id = t.app_id GROUP BY 1, 2, 3, 4
    UNION ALL SELECT '', '', '', false, 0
$$;

-- The profile whose maximum age of keys the key has; null for a key that is not rotated by age: its app is
-- retired, or belongs to another account.
ALTER TABLE keys ADD COLUMN profile text COLLATE "C";

CREATE FUNCTION keys_profile() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.profile := (SELECT profile FROM apps WHERE id = NEW.app_id AND state <> 'retired' AND user_id IS NULL);
    RETURN NEW;
END $$;
CREATE TRIGGER keys_profile BEFORE INSERT ON keys FOR EACH ROW EXECUTE FUNCTION keys_profile();

CREATE FUNCTION apps_keys_profile() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE keys SET profile = CASE WHEN NEW.state <> 'retired' AND NEW.user_id IS NULL THEN NEW.profile END WHERE app_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER apps_keys_profile AFTER UPDATE OF state, profile ON apps
    FOR EACH ROW WHEN (OLD.profile <> NEW.profile OR (OLD.state = 'retired') <> (NEW.state = 'retired'))
    EXECUTE FUNCTION apps_keys_profile();
