-- The job library makes its tables itself: `tenantry migrate up` of the older binary.
CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 9';

DROP INDEX apps_removal_due;
DROP INDEX apps_awaited;
DROP INDEX apps_in_work;
DROP INDEX keys_in_work;
CREATE INDEX keys_in_work ON keys (next_attempt_at) WHERE state IN ('creating', 'revoking');
CREATE INDEX keys_working ON keys (next_attempt_at) WHERE state = 'revoking';

ALTER TABLE keys DROP COLUMN requested_by;
ALTER TABLE keys DROP CONSTRAINT keys_priority;
UPDATE keys SET priority = 2 WHERE priority = 3;
ALTER TABLE keys RENAME COLUMN priority TO lane;
ALTER TABLE keys ALTER COLUMN lane SET DEFAULT 0;
ALTER TABLE keys ADD CONSTRAINT keys_lane CHECK (lane IN (0, 1, 2)) NOT VALID;

ALTER TABLE apps ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE keys ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE adoptions ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE reconciliations ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE campaigns ADD COLUMN enqueued_at timestamptz NOT NULL DEFAULT '-infinity';
