DROP TABLE campaign_items, campaigns, profile_revisions;
ALTER TABLE apps DROP COLUMN user_id;
DROP TABLE adoptions;
DROP INDEX tenants_by_profile;
DROP INDEX callers_created;
ALTER TABLE callers
    DROP COLUMN labels,
    DROP COLUMN rate_limit,
    DROP COLUMN replaced_by;
DROP TRIGGER apps_seal_guard ON apps;
DROP TRIGGER keys_seal_guard ON keys;
DROP FUNCTION apps_seal_guard(), keys_seal_guard(), refuse_removed_seal_key(bytea);
DROP TABLE removed_seal_keys;
ALTER TABLE apps DROP COLUMN marker_key_id;
DROP INDEX keys_sealed_by;
DROP INDEX audit_events_id, audit_events_actor, audit_events_action, audit_events_app, audit_events_key, audit_events_request;
ALTER TABLE audit_events ALTER COLUMN actor TYPE text COLLATE "default", ALTER COLUMN action TYPE text COLLATE "default";
DROP TABLE audit_seals;
DROP FUNCTION audit_seals_guard();
DROP INDEX keys_by_age, keys_expiring, keys_retiring, keys_in_work, keys_rotation;
ALTER TABLE keys
    DROP CONSTRAINT keys_rotation_whole,
    DROP COLUMN request_id,
    DROP COLUMN end_reason,
    DROP COLUMN remake,
    DROP COLUMN overlap,
    DROP COLUMN replaces,
    DROP COLUMN lane;
DROP INDEX apps_purged, apps_to_purge;
ALTER TABLE apps DROP COLUMN extra_keys_at, DROP COLUMN purging_since;
ALTER TABLE tenants DROP COLUMN app_user_id, DROP COLUMN deletion_protection;
