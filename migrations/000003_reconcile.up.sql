-- The restore fence: while it is up nothing is removed and no app is given to a tenant.
-- table_oid tells a table that a restore has made anew.
ALTER TABLE deployment
    ADD COLUMN table_oid    oid NOT NULL DEFAULT 'deployment'::regclass::oid,
    ADD COLUMN fence_since  timestamptz,
    ADD COLUMN fence_reason text NOT NULL DEFAULT '',
    ADD COLUMN fence_behind boolean NOT NULL DEFAULT false; -- Clarifai holds what the database does not know

ALTER TABLE apps
    -- Built before the fence went up: it may have been given to a tenant that the database has forgotten.
    ADD COLUMN suspect boolean NOT NULL DEFAULT false,
    -- A held app has work: its tenant is not in its marker yet, or it lacks a key.
    ADD COLUMN pending boolean NOT NULL DEFAULT false,
    ADD COLUMN marked_at timestamptz;
UPDATE apps SET pending = true WHERE state = 'held';
CREATE INDEX apps_pending ON apps (next_attempt_at) WHERE state = 'held' AND pending;

CREATE TABLE reconciliations (
    id              uuid PRIMARY KEY,
    kind            text NOT NULL CONSTRAINT reconciliations_kind CHECK (kind IN ('report', 'repair')),
    adopt_only      boolean NOT NULL DEFAULT false,
    report_id       uuid CONSTRAINT reconciliations_report REFERENCES reconciliations (id),
    requested_by    text NOT NULL,
    state           text NOT NULL DEFAULT 'running'
        CONSTRAINT reconciliations_state CHECK (state IN ('running', 'done')),
    phase           text NOT NULL
        CONSTRAINT reconciliations_phase CHECK (phase IN ('apps', 'keys', 'compare', 'confirm', 'repair', 'end')),
    page            integer NOT NULL DEFAULT 1,
    apps_seen       integer NOT NULL DEFAULT 0,
    keys_seen       integer NOT NULL DEFAULT 0,
    foreign_apps    integer NOT NULL DEFAULT 0,
    token           text CONSTRAINT reconciliations_token UNIQUE,
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    enqueued_at     timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts        integer NOT NULL DEFAULT 0,
    problem         jsonb,
    created_at      timestamptz NOT NULL DEFAULT now(), -- before the listing began
    finished_at     timestamptz,
    CONSTRAINT reconciliations_report_by_kind CHECK ((kind = 'repair') = (report_id IS NOT NULL)),
    CONSTRAINT reconciliations_finished_at CHECK ((state = 'done') = (finished_at IS NOT NULL)),
    CONSTRAINT reconciliations_token_by_kind CHECK (token IS NULL OR kind = 'report' AND state = 'done')
);
CREATE UNIQUE INDEX reconciliations_one_running ON reconciliations ((true)) WHERE state = 'running';
CREATE INDEX reconciliations_newest ON reconciliations (created_at DESC);

-- What Clarifai listed, until it is compared. No secrets: a key is its fingerprint.
CREATE TABLE reconciliation_apps (
    reconciliation_id uuid NOT NULL REFERENCES reconciliations (id),
    app_id            text COLLATE "C" NOT NULL,
    marker_app        text COLLATE "C" NOT NULL DEFAULT '', -- '' for an app without our marker
    tenant_id         text COLLATE "C",
    tenant_generation integer,
    PRIMARY KEY (reconciliation_id, app_id)
);
CREATE TABLE reconciliation_keys (
    reconciliation_id uuid NOT NULL REFERENCES reconciliations (id),
    app_id            text COLLATE "C" NOT NULL,
    key_id            uuid,  -- of our marker
    fingerprint       bytea, -- null where the listing is masked
    scopes            text[] NOT NULL
);
CREATE INDEX reconciliation_keys_key ON reconciliation_keys (reconciliation_id, key_id);
CREATE INDEX reconciliation_keys_fingerprint ON reconciliation_keys (reconciliation_id, fingerprint);

CREATE TABLE reconciliation_items (
    reconciliation_id uuid NOT NULL REFERENCES reconciliations (id),
    number            bigint GENERATED ALWAYS AS IDENTITY,
    kind              text NOT NULL,
    action            text NOT NULL DEFAULT '', -- what a repair does; '' for nothing
    app_id            text COLLATE "C",
    key_id            uuid,
    tenant_id         text COLLATE "C",
    detail            text NOT NULL DEFAULT '',
    state             text NOT NULL DEFAULT 'open'
        CONSTRAINT reconciliation_items_state CHECK (state IN ('doubted', 'open', 'done', 'skipped', 'failed')),
    ended_at          timestamptz,
    note              text NOT NULL DEFAULT '',
    PRIMARY KEY (reconciliation_id, number)
);
CREATE INDEX reconciliation_items_removed ON reconciliation_items (ended_at)
    WHERE state = 'done' AND action IN ('remove', 'revoke');
