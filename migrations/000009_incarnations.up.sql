-- Takes all locks before the first change, as in 000004.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE apps, keys, deployment, reconciliations, reconciliation_items IN ACCESS EXCLUSIVE MODE NOWAIT;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- Older code hands out apps of earlier incarnations.
CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 9';

ALTER TABLE deployment
    DROP COLUMN system_identifier,
    DROP COLUMN timeline,
    DROP COLUMN table_oid,
    DROP COLUMN fence_since,
    DROP COLUMN fence_reason,
    DROP COLUMN fence_behind;

-- One row for each uninterrupted life of the database. A restart, failover, restore or copy starts
-- the next one.
CREATE TABLE incarnations (
    id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    began_at timestamptz NOT NULL DEFAULT now(),
    reason   text NOT NULL
);
CREATE INDEX incarnations_began ON incarnations (began_at);

-- Processes that serve this database. A process registers again in each incarnation.
CREATE TABLE replicas (
    id           uuid PRIMARY KEY,
    incarnation  uuid NOT NULL,
    last_seen_at timestamptz NOT NULL DEFAULT now()
);

-- One row: the current incarnation, recovery mode, and the control record at Clarifai.
CREATE TABLE current_incarnation (
    only_row          boolean PRIMARY KEY DEFAULT true CONSTRAINT current_incarnation_only_row CHECK (only_row),
    id                uuid NOT NULL,
    -- The fingerprint. apps_file contains the OID of the database and the relfilenode of apps.
    server_started_at timestamptz NOT NULL DEFAULT pg_postmaster_start_time(),
    apps_file         text NOT NULL DEFAULT pg_relation_filepath('apps'),
    -- The transaction that wrote this row version, compared with xmin: a row that was loaded by a
    -- data-only restore, or changed by hand, does not match.
    written_by        xid NOT NULL DEFAULT pg_current_xact_id()::xid,
    began_at          timestamptz NOT NULL DEFAULT now(),
    -- Unassigned apps of earlier incarnations must still be marked as retired.
    retiring          boolean NOT NULL DEFAULT false,

    recovery          text CONSTRAINT current_incarnation_recovery CHECK (recovery IN ('watching', 'recovering', 'stopped')),
    recovery_since    timestamptz,
    recovery_reason   text NOT NULL DEFAULT '',
    lost              text NOT NULL DEFAULT '', -- what shows that transactions were lost; empty if nothing does
    watch_until       timestamptz,
    record            jsonb,                    -- the control record as the watch last read it
    record_renewals   integer NOT NULL DEFAULT 0,
    -- The next turn writes the control record unconditionally: the watch or a person has decided that
    -- this database is the one in use.
    claim_record      boolean NOT NULL DEFAULT false,

    seq               bigint NOT NULL DEFAULT 0, -- of the control record
    control_due_at    timestamptz NOT NULL DEFAULT '-infinity',
    control_seen_at   timestamptz,               -- when the control record was last known to exist
    control_problem   jsonb,
    CONSTRAINT current_incarnation_recovery_since CHECK ((recovery IS NULL) = (recovery_since IS NULL))
);
WITH first AS (INSERT INTO incarnations (reason) VALUES ('first start') RETURNING id)
INSERT INTO current_incarnation (id) SELECT id FROM first;

-- The incarnation for new rows. It does not compare the fingerprint.
CREATE FUNCTION stored_incarnation() RETURNS uuid LANGUAGE sql STABLE AS 'SELECT id FROM current_incarnation';

ALTER TABLE apps
    DROP CONSTRAINT apps_state,
    DROP CONSTRAINT apps_tenant_by_state,
    DROP CONSTRAINT apps_ready_at,
    ADD COLUMN incarnation uuid, -- in which the app was begun
    -- purge_after in the app's ownership tag: if row and tag differ, the purge is contested.
    ADD COLUMN tagged_purge_after timestamptz,
    -- The tag may have tagging_purge_after instead: the outcome of writing it is unknown.
    ADD COLUMN tagging boolean NOT NULL DEFAULT false,
    ADD COLUMN tagging_purge_after timestamptz,
    -- A command ended the keys of an app of an earlier incarnation: keys at Clarifai with our tag and
    -- without a row must be ended too.
    ADD COLUMN end_unknown_keys boolean NOT NULL DEFAULT false,
    ADD COLUMN keys_listed_in uuid, -- the incarnation in which such keys were last ended
    ADD COLUMN inputs bigint, -- in a retired app, by the last report; null if Clarifai did not say
    -- A person named this app for removal: neither tag nor unknown keys stop the removal.
    ADD COLUMN removal_confirmed boolean NOT NULL DEFAULT false;
UPDATE apps SET incarnation = stored_incarnation(),
    state = CASE WHEN suspect AND state IN ('building', 'ready') THEN 'retired' ELSE state END,
    pending = pending OR state = 'retained';
ALTER TABLE apps
    DROP COLUMN suspect,
    ALTER COLUMN incarnation SET NOT NULL,
    ALTER COLUMN incarnation SET DEFAULT stored_incarnation(),
    ADD CONSTRAINT apps_state CHECK (state IN ('building', 'ready', 'held', 'retained', 'retired', 'purging', 'deleted')),
    ADD CONSTRAINT apps_tenant_by_state CHECK (
        CASE
            WHEN state IN ('building', 'ready', 'retired') THEN tenant_id IS NULL
            WHEN state IN ('held', 'retained') THEN tenant_id IS NOT NULL
            ELSE true
        END),
    ADD CONSTRAINT apps_ready_at CHECK (state IN ('building', 'retired', 'purging', 'deleted') OR ready_at IS NOT NULL),
    ADD CONSTRAINT apps_removal_confirmed CHECK (NOT removal_confirmed OR state IN ('retained', 'purging', 'deleted'));
DROP INDEX apps_ready;
CREATE INDEX apps_ready ON apps (profile, incarnation, ready_at, id) WHERE state = 'ready';
CREATE INDEX apps_retired ON apps (profile) WHERE state = 'retired';
CREATE INDEX apps_retired_by_age ON apps (created_at, id) WHERE state = 'retired';
DROP INDEX apps_pending;
CREATE INDEX apps_pending ON apps (background, next_attempt_at) WHERE state IN ('held', 'retained') AND pending;

ALTER TABLE keys ADD COLUMN incarnation uuid; -- of the last decision about the key
UPDATE keys SET incarnation = stored_incarnation();
ALTER TABLE keys ALTER COLUMN incarnation SET NOT NULL, ALTER COLUMN incarnation SET DEFAULT stored_incarnation();

ALTER TABLE adoptions
    ADD COLUMN by_admin boolean NOT NULL DEFAULT false, -- requested by an admin
    ADD COLUMN reserved boolean NOT NULL DEFAULT false; -- its worker may write the ownership tag; one adoption per app
CREATE UNIQUE INDEX adoptions_one_reserved ON adoptions (app_id) WHERE reserved;

-- Leaked keys without a row. A worker asks Clarifai, with the key itself, which app it opens.
CREATE TABLE quarantines (
    id              uuid PRIMARY KEY, -- also of the row of the key, if it opens an app of ours
    ciphertext      bytea,
    fingerprint     bytea NOT NULL,
    state           text NOT NULL DEFAULT 'checking' CONSTRAINT quarantines_state CHECK (state IN ('checking', 'done', 'refused')),
    requested_by    text NOT NULL,
    request_id      text,
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts        integer NOT NULL DEFAULT 0,
    problem         jsonb,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT quarantines_one_a_key UNIQUE (fingerprint),
    CONSTRAINT quarantines_secret_by_state CHECK ((ciphertext IS NOT NULL) = (state = 'checking'))
);
CREATE INDEX quarantines_due ON quarantines (next_attempt_at) WHERE state = 'checking';
CREATE TRIGGER quarantines_seal_guard BEFORE INSERT OR UPDATE OF ciphertext ON quarantines
    FOR EACH ROW WHEN (NEW.ciphertext IS NOT NULL) EXECUTE FUNCTION keys_seal_guard();

-- A repair carries out decisions, or the report that a token names. A slow listing is read in smaller
-- pages.
ALTER TABLE reconciliations
    DROP COLUMN adopt_only,
    ADD COLUMN decisions boolean NOT NULL DEFAULT false,
    ADD COLUMN per_page integer NOT NULL DEFAULT 1000 CONSTRAINT reconciliations_per_page CHECK (per_page BETWEEN 1 AND 1000);
ALTER TABLE reconciliation_items
    DROP CONSTRAINT reconciliation_items_state,
    ADD CONSTRAINT reconciliation_items_state CHECK (state IN ('doubted', 'open', 'decided', 'done', 'skipped', 'failed')),
    ADD COLUMN decided_by text;
DROP INDEX reconciliation_items_next;
CREATE INDEX reconciliation_items_next ON reconciliation_items (reconciliation_id, state, number);
CREATE INDEX reconciliation_items_decided ON reconciliation_items (reconciliation_id) WHERE state = 'decided';
CREATE INDEX reconciliation_items_kept ON reconciliation_items (app_id) WHERE action = 'keep';
