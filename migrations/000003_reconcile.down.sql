DROP TABLE reconciliation_items, reconciliation_keys, reconciliation_apps, reconciliations;
ALTER TABLE apps
    DROP COLUMN suspect,
    DROP COLUMN pending,
    DROP COLUMN marked_at;
ALTER TABLE deployment
    DROP COLUMN table_oid,
    DROP COLUMN fence_since,
    DROP COLUMN fence_reason,
    DROP COLUMN fence_behind;
