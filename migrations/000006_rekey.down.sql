DROP TRIGGER apps_seal_guard ON apps;
DROP TRIGGER keys_seal_guard ON keys;
DROP FUNCTION apps_seal_guard(), keys_seal_guard(), refuse_removed_seal_key(bytea);
DROP TABLE removed_seal_keys;
ALTER TABLE apps DROP COLUMN marker_key_id;
DROP INDEX keys_sealed_by;
