DROP INDEX reconciliation_items_next;
DROP INDEX reconciliation_apps_moved;
DROP INDEX reconciliation_keys_app;
ALTER TABLE reconciliations DROP COLUMN compared;
