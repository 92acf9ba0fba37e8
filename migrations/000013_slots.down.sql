CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 11';

ALTER TABLE upstream_budget
    ADD COLUMN next_slot_at timestamptz NOT NULL DEFAULT 'epoch',
    ADD COLUMN failures     integer NOT NULL DEFAULT 0;
UPDATE upstream_budget SET failures = (SELECT last_value FROM upstream_failures),
    next_slot_at = 'epoch'::timestamptz + (SELECT last_value FROM upstream_slots) * interval '1 microsecond';
DROP SEQUENCE upstream_slots, upstream_failures;
