-- Apps that were made by hand and are to be taken over. There is no tenant until the app was looked
-- at: a row that is refused leaves nothing, one that succeeds is gone.
CREATE TABLE adoptions (
    id              uuid PRIMARY KEY, -- and of the row of the tenant's key
    tenant_id       text COLLATE "C" NOT NULL CONSTRAINT adoptions_tenant_id CHECK (length(tenant_id) BETWEEN 1 AND 128),
    dry_run         boolean NOT NULL,
    app_id          text COLLATE "C" NOT NULL CONSTRAINT adoptions_app_id CHECK (length(app_id) BETWEEN 1 AND 64),
    app_user_id     text,  -- null for the operator's own
    profile         text NOT NULL,
    display_name    text NOT NULL,
    labels          jsonb NOT NULL CONSTRAINT adoptions_labels CHECK (jsonb_typeof(labels) = 'object'),
    attributes_hash bytea NOT NULL CONSTRAINT adoptions_attributes_hash CHECK (length(attributes_hash) = 64),
    ciphertext      bytea, -- the key that was given; null if one is to be made
    fingerprint     bytea,
    state           text NOT NULL DEFAULT 'checking'
        CONSTRAINT adoptions_state CHECK (state IN ('checking', 'possible', 'refused')),
    told            boolean NOT NULL DEFAULT false, -- somebody was told how it ended
    requested_by    text NOT NULL,
    request_id      text,
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    enqueued_at     timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts        integer NOT NULL DEFAULT 0 CONSTRAINT adoptions_attempts CHECK (attempts >= 0),
    problem         jsonb,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT adoptions_one_a_tenant UNIQUE (tenant_id, dry_run),
    CONSTRAINT adoptions_possible CHECK (state <> 'possible' OR dry_run),
    CONSTRAINT adoptions_refused CHECK (state <> 'refused' OR problem IS NOT NULL),
    CONSTRAINT adoptions_secret_by_state CHECK (ciphertext IS NULL OR state = 'checking' AND fingerprint IS NOT NULL)
);
CREATE INDEX adoptions_due ON adoptions (next_attempt_at) WHERE state = 'checking';
CREATE INDEX adoptions_ended ON adoptions (updated_at) WHERE state <> 'checking';
CREATE TRIGGER adoptions_seal_guard BEFORE INSERT OR UPDATE OF ciphertext ON adoptions
    FOR EACH ROW WHEN (NEW.ciphertext IS NOT NULL) EXECUTE FUNCTION keys_seal_guard();

-- Whose the app is upstream; null for the operator's own. What it outlives, tenants.app_user_id does not.
ALTER TABLE apps ADD COLUMN user_id text;
