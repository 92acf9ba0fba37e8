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

DROP INDEX IF EXISTS apps_in_trouble, keys_in_trouble, apps_building, adoptions_sealed_by, quarantines_sealed_by, reconciliation_items_open;

DROP TRIGGER apps_keys_profile ON apps;
DROP TRIGGER keys_profile ON keys;
DROP FUNCTION apps_keys_profile, keys_profile;
ALTER TABLE keys DROP COLUMN profile;
CREATE INDEX IF NOT EXISTS keys_by_age ON keys (activated_at) WHERE state = 'active';

DROP TRIGGER apps_revision ON apps;
DROP TRIGGER tenants_inserted ON tenants;
DROP TRIGGER tenants_changed ON tenants;
DROP TRIGGER tenants_removed ON tenants;
DROP FUNCTION tenant_counts_inserted, tenant_counts_changed, tenant_counts_revision, tenant_counts_recount;
DROP TABLE tenant_counts;
