-- A comparison goes app by app, in the order of their ids, and writes down how far it is.
ALTER TABLE reconciliations ADD COLUMN compared text COLLATE "C" NOT NULL DEFAULT '';
CREATE INDEX reconciliation_keys_app ON reconciliation_keys (reconciliation_id, app_id);
CREATE INDEX reconciliation_apps_moved ON reconciliation_apps (reconciliation_id, marker_app) WHERE marker_app <> '' AND marker_app <> app_id;
-- What is confirmed or repaired next.
CREATE INDEX reconciliation_items_next ON reconciliation_items (reconciliation_id, state, (action <> 'adopt'), number);

-- Queues are partial indexes, and who looks into one passes what has left it since the last
-- vacuum: by default that may be a fifth of all rows.
ALTER TABLE apps SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02);
ALTER TABLE tenants SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02);
ALTER TABLE keys SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.02);
