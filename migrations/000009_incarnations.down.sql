DROP INDEX reconciliation_items_kept, reconciliation_items_decided, reconciliation_items_next;
DELETE FROM reconciliation_items WHERE state = 'decided';
ALTER TABLE reconciliation_items
    DROP COLUMN decided_by,
    DROP CONSTRAINT reconciliation_items_state,
    ADD CONSTRAINT reconciliation_items_state CHECK (state IN ('doubted', 'open', 'done', 'skipped', 'failed'));
CREATE INDEX reconciliation_items_next ON reconciliation_items (reconciliation_id, state, (action <> 'adopt'), number);
ALTER TABLE reconciliations
    DROP COLUMN per_page,
    DROP COLUMN decisions,
    ADD COLUMN adopt_only boolean NOT NULL DEFAULT false;
DROP TABLE quarantines;
ALTER TABLE adoptions DROP COLUMN by_admin, DROP COLUMN reserved;
ALTER TABLE keys DROP COLUMN incarnation;
DROP INDEX apps_pending, apps_retired, apps_retired_by_age, apps_ready;
ALTER TABLE apps
    DROP CONSTRAINT apps_state,
    DROP CONSTRAINT apps_tenant_by_state,
    DROP CONSTRAINT apps_ready_at,
    ADD COLUMN suspect boolean NOT NULL DEFAULT false;
-- Older code has suspect apps instead of retired ones.
UPDATE apps SET state = CASE WHEN made_at IS NULL OR ready_at IS NULL THEN 'building' ELSE 'ready' END, suspect = true WHERE state = 'retired';
UPDATE apps SET pending = false WHERE state = 'retained' AND pending;
ALTER TABLE apps
    DROP COLUMN incarnation,
    DROP COLUMN tagged_purge_after,
    DROP COLUMN tagging,
    DROP COLUMN tagging_purge_after,
    DROP COLUMN end_unknown_keys,
    DROP COLUMN keys_listed_in,
    DROP COLUMN inputs,
    DROP COLUMN removal_confirmed,
    ADD CONSTRAINT apps_state CHECK (state IN ('building', 'ready', 'held', 'retained', 'purging', 'deleted')),
    ADD CONSTRAINT apps_tenant_by_state CHECK (
        CASE
            WHEN state IN ('building', 'ready') THEN tenant_id IS NULL
            WHEN state IN ('held', 'retained') THEN tenant_id IS NOT NULL
            ELSE true
        END),
    ADD CONSTRAINT apps_ready_at CHECK (state = 'building' OR state IN ('purging', 'deleted') OR ready_at IS NOT NULL);
CREATE INDEX apps_ready ON apps (profile, ready_at, id) WHERE state = 'ready';
CREATE INDEX apps_pending ON apps (background, next_attempt_at) WHERE state = 'held' AND pending;
DROP FUNCTION stored_incarnation();
DROP TABLE current_incarnation, replicas, incarnations;
ALTER TABLE deployment
    ADD COLUMN system_identifier bigint NOT NULL DEFAULT 0,
    ADD COLUMN timeline integer NOT NULL DEFAULT 0,
    ADD COLUMN table_oid oid NOT NULL DEFAULT 'deployment'::regclass::oid,
    ADD COLUMN fence_since timestamptz,
    ADD COLUMN fence_reason text NOT NULL DEFAULT '',
    ADD COLUMN fence_behind boolean NOT NULL DEFAULT false;
UPDATE deployment SET (system_identifier, timeline) =
    (SELECT s.system_identifier, c.timeline_id FROM pg_control_system() s, pg_control_checkpoint() c);
ALTER TABLE deployment ALTER COLUMN system_identifier DROP DEFAULT, ALTER COLUMN timeline DROP DEFAULT;
CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1';
