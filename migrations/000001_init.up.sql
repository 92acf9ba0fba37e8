-- The lowest schema version whose code still runs on this schema. A migration that takes away
-- what older code needs replaces it.
CREATE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1';

-- One row: which deployment this database belongs to, and which keyset sealed it.
CREATE TABLE deployment (
    only_row          boolean PRIMARY KEY DEFAULT true CONSTRAINT deployment_only_row CHECK (only_row),
    id                text NOT NULL CONSTRAINT deployment_id CHECK (id ~ '^[0-9a-z]{16}$'),
    operator_user_id  text NOT NULL,
    keyset_probe      bytea NOT NULL,
    system_identifier bigint NOT NULL,
    timeline          integer NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT now()
);

-- One row: when the next upstream call may begin, for all replicas together.
CREATE TABLE upstream_budget (
    only_row     boolean PRIMARY KEY DEFAULT true CONSTRAINT upstream_budget_only_row CHECK (only_row),
    next_slot_at timestamptz NOT NULL DEFAULT 'epoch', -- not -infinity: it is reckoned with
    paused_until timestamptz NOT NULL DEFAULT 'epoch',
    pause_reason jsonb
);
INSERT INTO upstream_budget DEFAULT VALUES;

CREATE TABLE apps (
    id                text COLLATE "C" PRIMARY KEY CONSTRAINT apps_id CHECK (length(id) BETWEEN 1 AND 64),
    profile           text NOT NULL,
    profile_revision  text NOT NULL,
    state             text NOT NULL DEFAULT 'building'
        CONSTRAINT apps_state CHECK (state IN ('building', 'ready', 'held', 'retained', 'purging', 'deleted')),
    tenant_id         text COLLATE "C",
    tenant_generation integer,
    -- A call that may make or remove the app upstream was begun and its outcome is not recorded.
    in_doubt_since    timestamptz,
    made_at           timestamptz,
    ready_at          timestamptz,
    leased_until      timestamptz NOT NULL DEFAULT '-infinity',
    enqueued_at       timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at   timestamptz NOT NULL DEFAULT now(),
    attempts          integer NOT NULL DEFAULT 0 CONSTRAINT apps_attempts CHECK (attempts >= 0),
    problem           jsonb,
    purge_after       timestamptz,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT apps_tenant_whole CHECK ((tenant_id IS NULL) = (tenant_generation IS NULL)),
    CONSTRAINT apps_tenant_by_state CHECK (
        CASE
            WHEN state IN ('building', 'ready') THEN tenant_id IS NULL
            WHEN state IN ('held', 'retained') THEN tenant_id IS NOT NULL
            ELSE true
        END),
    CONSTRAINT apps_ready_at CHECK (state = 'building' OR state IN ('purging', 'deleted') OR ready_at IS NOT NULL),
    CONSTRAINT apps_made_at CHECK (state NOT IN ('ready', 'held', 'retained') OR made_at IS NOT NULL),
    -- What tenants.app_id refers to: an app and the one tenant it was given to.
    CONSTRAINT apps_tenant_key UNIQUE (id, tenant_id, tenant_generation)
);
CREATE UNIQUE INDEX apps_one_held_a_tenant ON apps (tenant_id) WHERE state = 'held';
CREATE INDEX apps_tenant ON apps (tenant_id) WHERE tenant_id IS NOT NULL;
CREATE INDEX apps_ready ON apps (profile, ready_at, id) WHERE state = 'ready';
CREATE INDEX apps_working ON apps (profile, next_attempt_at) WHERE state IN ('building', 'purging');

-- R1: an app is never given to a second tenant, in any generation, and a row is never lost.
CREATE FUNCTION apps_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'rows of apps are never deleted' USING ERRCODE = 'restrict_violation', CONSTRAINT = 'apps_never_deleted';
    END IF;
    IF NEW.id <> OLD.id THEN
        RAISE EXCEPTION 'the id of an app never changes' USING ERRCODE = 'restrict_violation', CONSTRAINT = 'apps_id_fixed';
    END IF;
    IF OLD.tenant_id IS NOT NULL AND (NEW.tenant_id, NEW.tenant_generation)
        IS DISTINCT FROM (OLD.tenant_id, OLD.tenant_generation) THEN
        RAISE EXCEPTION 'the tenant of an app never changes' USING ERRCODE = 'restrict_violation', CONSTRAINT = 'apps_tenant_fixed';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER apps_guard BEFORE DELETE OR UPDATE OF id, tenant_id, tenant_generation ON apps
    FOR EACH ROW EXECUTE FUNCTION apps_guard();

CREATE TABLE tenants (
    id              text COLLATE "C" PRIMARY KEY CONSTRAINT tenants_id CHECK (length(id) BETWEEN 1 AND 128),
    generation      integer NOT NULL DEFAULT 1 CONSTRAINT tenants_generation CHECK (generation >= 1),
    profile         text NOT NULL,
    state           text NOT NULL DEFAULT 'provisioning'
        CONSTRAINT tenants_state CHECK (state IN ('provisioning', 'active', 'suspending', 'suspended', 'resuming',
                                                  'deleting', 'purging', 'deleted')),
    state_since     timestamptz NOT NULL DEFAULT now(),
    app_id          text COLLATE "C",
    display_name    text NOT NULL DEFAULT '',
    labels          jsonb NOT NULL DEFAULT '{}' CONSTRAINT tenants_labels CHECK (jsonb_typeof(labels) = 'object'),
    attributes_hash bytea NOT NULL CONSTRAINT tenants_attributes_hash CHECK (length(attributes_hash) = 64),
    problem         jsonb,
    version         bigint NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenants_app_by_state CHECK ((app_id IS NULL) = (state IN ('provisioning', 'deleted'))),
    CONSTRAINT tenants_app_is_theirs FOREIGN KEY (app_id, id, generation)
        REFERENCES apps (id, tenant_id, tenant_generation)
);
CREATE UNIQUE INDEX tenants_app ON tenants (app_id) WHERE app_id IS NOT NULL;
CREATE INDEX tenants_waiting ON tenants (profile, state_since, id) WHERE state = 'provisioning';
CREATE INDEX tenants_created ON tenants (created_at, id);
CREATE INDEX tenants_by_state ON tenants (state, created_at, id);
CREATE INDEX tenants_by_label ON tenants USING gin (labels jsonb_path_ops);
CREATE INDEX tenants_in_trouble ON tenants (created_at, id) WHERE problem IS NOT NULL;

CREATE TABLE keys (
    id              uuid PRIMARY KEY,
    app_id          text COLLATE "C" NOT NULL CONSTRAINT keys_app REFERENCES apps (id),
    name            text NOT NULL CONSTRAINT keys_name CHECK (name ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    state           text NOT NULL DEFAULT 'creating'
        CONSTRAINT keys_state CHECK (state IN ('creating', 'active', 'retiring', 'revoking', 'revoked', 'lost')),
    scopes          text[] NOT NULL,
    ciphertext      bytea,
    fingerprint     bytea,
    hint            text NOT NULL DEFAULT '',
    rotation_id     text,
    retires_at      timestamptz,
    expires_at      timestamptz,
    -- A call that may have made the key was begun and its outcome is not recorded.
    in_doubt_since  timestamptz,
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    enqueued_at     timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts        integer NOT NULL DEFAULT 0 CONSTRAINT keys_attempts CHECK (attempts >= 0),
    problem         jsonb,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    activated_at    timestamptz,
    revoked_at      timestamptz,
    CONSTRAINT keys_secret_by_state CHECK (
        CASE
            WHEN state IN ('active', 'retiring') THEN ciphertext IS NOT NULL
            WHEN state = 'revoking' THEN true
            ELSE ciphertext IS NULL
        END),
    CONSTRAINT keys_fingerprint_with_secret CHECK (ciphertext IS NULL OR fingerprint IS NOT NULL),
    CONSTRAINT keys_activated_at CHECK (state NOT IN ('active', 'retiring') OR activated_at IS NOT NULL),
    CONSTRAINT keys_revoked_at CHECK ((state = 'revoked') = (revoked_at IS NOT NULL))
);
CREATE UNIQUE INDEX keys_one_active_a_name ON keys (app_id, name) WHERE state = 'active';
CREATE UNIQUE INDEX keys_one_creating_a_name ON keys (app_id, name) WHERE state = 'creating';
CREATE UNIQUE INDEX keys_fingerprint ON keys (fingerprint) WHERE fingerprint IS NOT NULL;
CREATE INDEX keys_by_app ON keys (app_id);
CREATE INDEX keys_working ON keys (next_attempt_at) WHERE state = 'revoking';

CREATE TABLE callers (
    token_id      text PRIMARY KEY,
    name          text NOT NULL CONSTRAINT callers_name CHECK (length(name) BETWEEN 1 AND 128),
    role          text NOT NULL CONSTRAINT callers_role CHECK (role IN ('viewer', 'provisioner', 'admin')),
    secret_sha256 bytea NOT NULL CONSTRAINT callers_secret_sha256 CHECK (length(secret_sha256) = 32),
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    last_used_at  timestamptz
);

CREATE TABLE audit_events (
    id                  bigint GENERATED ALWAYS AS IDENTITY,
    at                  timestamptz NOT NULL DEFAULT now(),
    transaction_id      xid8 NOT NULL DEFAULT pg_current_xact_id(),
    actor               text NOT NULL,
    action              text NOT NULL,
    tenant_id           text COLLATE "C",
    app_id              text COLLATE "C",
    key_id              uuid,
    request_id          text,
    upstream_request_id text,
    detail              jsonb NOT NULL DEFAULT '{}',
    CONSTRAINT audit_events_pkey PRIMARY KEY (at, id)
) PARTITION BY RANGE (at);
CREATE INDEX audit_events_tenant ON audit_events (tenant_id, at, id);

-- Holds what no month's partition takes, so that a missing partition never refuses an event.
CREATE TABLE audit_events_other PARTITION OF audit_events DEFAULT;

CREATE FUNCTION audit_events_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'audit_events is append only' USING ERRCODE = 'restrict_violation', CONSTRAINT = 'audit_events_append_only';
END $$;
CREATE TRIGGER audit_events_guard BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_events_guard();
CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard();

-- Makes the partitions of this month and of as many months to come. A month that the default
-- partition already holds events of is left to it.
CREATE FUNCTION audit_events_make_partitions(months integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    first date;
    name  text;
    made  integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('audit_events_make_partitions'));
    FOR i IN 0..months LOOP
        first := (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => i))::date;
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM audit_events_other
            WHERE at >= first::timestamp AT TIME ZONE 'UTC' AND at < (first + interval '1 month') AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TABLE %I PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)', name,
            first::timestamp AT TIME ZONE 'UTC', (first + interval '1 month') AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON %I
            FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard()', name);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;
CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON audit_events_other
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard();
SELECT audit_events_make_partitions(3);
