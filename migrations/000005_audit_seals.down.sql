DROP INDEX audit_events_id, audit_events_actor, audit_events_action, audit_events_app, audit_events_key, audit_events_request;
ALTER TABLE audit_events ALTER COLUMN actor TYPE text COLLATE "default", ALTER COLUMN action TYPE text COLLATE "default";
DROP TABLE audit_seals;
DROP FUNCTION audit_seals_guard();
