ALTER TABLE keys RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold, autovacuum_analyze_scale_factor);
ALTER TABLE tenants RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold, autovacuum_analyze_scale_factor);
ALTER TABLE apps RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold, autovacuum_analyze_scale_factor);
DROP INDEX reconciliation_items_next;
DROP INDEX reconciliation_apps_moved;
DROP INDEX reconciliation_keys_app;
ALTER TABLE reconciliations DROP COLUMN compared;
