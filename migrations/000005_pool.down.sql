DROP INDEX apps_to_prove;
ALTER TABLE apps DROP COLUMN proven_at, DROP COLUMN for_pool;
DROP TABLE pools;
