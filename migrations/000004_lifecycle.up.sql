-- All locks that this takes, before anything is changed: sign-ups and workers take the same tables
-- in other orders, and one of two that wait for each other would be cut off.
DO $$ BEGIN
    PERFORM set_config('lock_timeout', '1s', true);
    LOOP
        BEGIN
            LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE;
            LOCK TABLE apps, keys, callers, audit_events IN ACCESS EXCLUSIVE MODE NOWAIT;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.02); -- with none of the locks
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '0', true);
END $$;

-- The life of a tenant after its sign-up, and of its keys.
ALTER TABLE tenants
    ADD COLUMN deletion_protection boolean NOT NULL DEFAULT false,
    ADD COLUMN app_user_id         text; -- whose the app is upstream; null for the operator's own

ALTER TABLE apps
    ADD COLUMN purging_since timestamptz, -- since when the app of a tenant is removed
    ADD COLUMN extra_keys_at timestamptz; -- when its tenant got the further keys of its profile
CREATE INDEX apps_to_purge ON apps (purge_after) WHERE state = 'retained';
CREATE INDEX apps_purged ON apps (purging_since) WHERE purging_since IS NOT NULL;

ALTER TABLE keys
    -- In which lane its calls are made: 0 urgent, 1 normal, 2 background.
    ADD COLUMN lane       smallint NOT NULL DEFAULT 0 CONSTRAINT keys_lane CHECK (lane IN (0, 1, 2)),
    -- A rotation is the row of its new key: which key that replaces, and for how long both work.
    ADD COLUMN replaces   uuid CONSTRAINT keys_replaces REFERENCES keys (id),
    ADD COLUMN overlap    interval,
    -- It is made anew when its tenant resumes.
    ADD COLUMN remake     boolean NOT NULL DEFAULT false,
    -- Why it works no longer, or shall not.
    ADD COLUMN end_reason text,
    ADD COLUMN request_id text, -- that the key is made or revoked for
    ADD CONSTRAINT keys_rotation_whole CHECK (replaces IS NULL OR overlap IS NOT NULL);
CREATE UNIQUE INDEX keys_rotation ON keys (app_id, name, rotation_id) WHERE rotation_id IS NOT NULL;
CREATE INDEX keys_in_work ON keys (next_attempt_at) WHERE state IN ('creating', 'revoking');
CREATE INDEX keys_retiring ON keys (retires_at) WHERE state = 'retiring';
CREATE INDEX keys_expiring ON keys (expires_at) WHERE expires_at IS NOT NULL AND state IN ('creating', 'active', 'retiring');
CREATE INDEX keys_by_age ON keys (activated_at) WHERE state = 'active';

-- Seals of the audit log: each covers the events after those of the seal before it, and names that
-- seal by its hash. They are made by `serve` and checked by `tenantry audit verify`.
CREATE TABLE audit_seals (
    number        bigint PRIMARY KEY CONSTRAINT audit_seals_number CHECK (number >= 1),
    after_id      bigint NOT NULL, -- the last event of the seal before
    last_id       bigint NOT NULL,
    -- Of each event, in the order of the ids: its id in 8 bytes and the digest of its columns in 16.
    entries       bytea NOT NULL CONSTRAINT audit_seals_entries CHECK (length(entries) > 0 AND length(entries) % 24 = 0),
    previous_hash bytea NOT NULL,  -- of the seal before; 32 zero bytes in the first
    hash          bytea NOT NULL CONSTRAINT audit_seals_hash CHECK (length(hash) = 32), -- SHA-256 of all other columns
    sealed_at     timestamptz NOT NULL,
    CONSTRAINT audit_seals_range CHECK (last_id > after_id)
);
-- Digests do not compress.
ALTER TABLE audit_seals ALTER COLUMN entries SET STORAGE EXTERNAL;

CREATE FUNCTION audit_seals_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'audit_seals is append only' USING ERRCODE = 'restrict_violation', CONSTRAINT = 'audit_seals_append_only';
END $$;
CREATE TRIGGER audit_seals_guard BEFORE UPDATE OR DELETE ON audit_seals
    FOR EACH ROW EXECUTE FUNCTION audit_seals_guard();
CREATE TRIGGER audit_seals_guard_truncate BEFORE TRUNCATE ON audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION audit_seals_guard();

-- Compared byte by byte, which is what makes the indexes below cheap to keep.
ALTER TABLE audit_events ALTER COLUMN actor TYPE text COLLATE "C", ALTER COLUMN action TYPE text COLLATE "C";
-- Sealing goes by id. The log is read in the order of time; what one app, key or request did is
-- little enough to be sorted, and a hash index costs each event less than a sorted one.
CREATE INDEX audit_events_id ON audit_events (id);
CREATE INDEX audit_events_actor ON audit_events (actor, at, id);
CREATE INDEX audit_events_action ON audit_events (action, at, id);
CREATE INDEX audit_events_app ON audit_events USING hash (app_id);
CREATE INDEX audit_events_key ON audit_events USING hash (key_id);
CREATE INDEX audit_events_request ON audit_events USING hash (request_id);

-- Which key of the keyset sealed a key: the four bytes after the first of what Tink seals.
CREATE INDEX keys_sealed_by ON keys (substring(ciphertext from 2 for 4), id) WHERE ciphertext IS NOT NULL;

ALTER TABLE apps
    -- Which key of the keyset sealed the tenant in the marker upstream; -1 for a marker that names
    -- none. Null where that is not known, and where the app was never marked.
    ADD COLUMN marker_key_id bigint CONSTRAINT apps_marker_key_id CHECK (marker_key_id BETWEEN -1 AND 4294967295);
CREATE INDEX apps_marker_sealed_by ON apps (marker_key_id) WHERE state IN ('held', 'retained');

-- Keys that are no longer in the keyset. A replica that has not read the new keyset yet must not
-- seal by one of them: nobody could open it.
CREATE TABLE removed_seal_keys (
    key_id     bytea PRIMARY KEY CONSTRAINT removed_seal_keys_key_id CHECK (length(key_id) = 4),
    removed_at timestamptz NOT NULL DEFAULT now()
);

-- Who removes a key takes the lock alone, so that nothing by that key is on its way.
CREATE FUNCTION refuse_removed_seal_key(id bytea) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtext('seal keys'), 0);
    IF EXISTS (SELECT FROM removed_seal_keys WHERE key_id = id) THEN
        RAISE EXCEPTION 'it is sealed by a key that was removed from the keyset'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'sealed_by_removed_key';
    END IF;
END $$;

CREATE FUNCTION keys_seal_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM refuse_removed_seal_key(substring(NEW.ciphertext from 2 for 4));
    RETURN NEW;
END $$;
CREATE TRIGGER keys_seal_guard BEFORE INSERT OR UPDATE OF ciphertext ON keys
    FOR EACH ROW WHEN (NEW.ciphertext IS NOT NULL) EXECUTE FUNCTION keys_seal_guard();

CREATE FUNCTION apps_seal_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM refuse_removed_seal_key(substring(int8send(NEW.marker_key_id) from 5 for 4));
    RETURN NEW;
END $$;
CREATE TRIGGER apps_seal_guard BEFORE UPDATE OF marker_key_id ON apps
    FOR EACH ROW WHEN (NEW.marker_key_id >= 0) EXECUTE FUNCTION apps_seal_guard();

-- A caller with labels sees and changes only the tenants that have all of them. The hash of its token
-- is hashed once more: code that does not know of the limit finds no such token, and takes it for no
-- other.
ALTER TABLE callers
    ADD COLUMN labels      jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT callers_labels CHECK (jsonb_typeof(labels) = 'object'),
    ADD COLUMN rate_limit  integer CONSTRAINT callers_rate_limit CHECK (rate_limit BETWEEN 1 AND 10000),
    ADD COLUMN replaced_by text CONSTRAINT callers_replaced_by REFERENCES callers (token_id);
CREATE INDEX callers_created ON callers (created_at, token_id);

-- Which profiles live tenants are on, without reading the tenants.
CREATE INDEX tenants_by_profile ON tenants (profile) WHERE state <> 'deleted';

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

-- What each revision of a profile makes of an app and its keys, since the schema has this table.
CREATE TABLE profile_revisions (
    revision text PRIMARY KEY,
    shape    jsonb NOT NULL CONSTRAINT profile_revisions_shape CHECK (jsonb_typeof(shape) = 'object'),
    seen_at  timestamptz NOT NULL DEFAULT now()
);

-- A campaign takes many tenants through one change. It walks over keys or apps by their ids, so that
-- nothing is written for those that are still to come.
CREATE TABLE campaigns (
    id              uuid PRIMARY KEY,
    kind            text NOT NULL CONSTRAINT campaigns_kind CHECK (kind IN ('rotate', 'conform')),
    state           text NOT NULL DEFAULT 'running'
        CONSTRAINT campaigns_state CHECK (state IN ('running', 'paused', 'stopped', 'done')),
    filter          jsonb NOT NULL CONSTRAINT campaigns_filter CHECK (jsonb_typeof(filter) = 'object'),
    overlap         interval, -- of its rotations
    revision        text CONSTRAINT campaigns_revision REFERENCES profile_revisions (revision), -- that it brings apps to
    created_by      text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(), -- what is newer is left alone
    ended_at        timestamptz, -- when nothing of it was under way any more
    count_cursor    text NOT NULL DEFAULT '',
    counted         boolean NOT NULL DEFAULT false,
    cursor          text NOT NULL DEFAULT '',
    walked          boolean NOT NULL DEFAULT false, -- to the end
    total           integer NOT NULL DEFAULT 0,
    done            integer NOT NULL DEFAULT 0,
    skipped         integer NOT NULL DEFAULT 0,
    failed          integer NOT NULL DEFAULT 0,
    under_way       integer NOT NULL DEFAULT 0 CONSTRAINT campaigns_under_way CHECK (under_way >= 0),
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    enqueued_at     timestamptz NOT NULL DEFAULT '-infinity',
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    attempts        integer NOT NULL DEFAULT 0,
    problem         jsonb,
    CONSTRAINT campaigns_by_kind CHECK (
        (kind = 'rotate') = (overlap IS NOT NULL) AND (kind = 'conform') = (revision IS NOT NULL)),
    CONSTRAINT campaigns_ended_at CHECK (
        CASE state WHEN 'done' THEN ended_at IS NOT NULL WHEN 'stopped' THEN true ELSE ended_at IS NULL END),
    CONSTRAINT campaigns_ended CHECK (ended_at IS NULL OR under_way = 0)
);
CREATE UNIQUE INDEX campaigns_one_open ON campaigns (kind, filter) WHERE state IN ('running', 'paused');
CREATE INDEX campaigns_open ON campaigns (next_attempt_at) WHERE ended_at IS NULL;
CREATE INDEX campaigns_newest ON campaigns (created_at, id);

-- What of a campaign is under way, was skipped or has failed. What is done is counted, and told by
-- the audit log.
CREATE TABLE campaign_items (
    campaign_id uuid NOT NULL REFERENCES campaigns (id),
    number      bigint GENERATED ALWAYS AS IDENTITY,
    tenant_id   text COLLATE "C" NOT NULL,
    app_id      text COLLATE "C" NOT NULL,
    key_name    text NOT NULL DEFAULT '',
    state       text NOT NULL CONSTRAINT campaign_items_state CHECK (state IN ('under_way', 'skipped', 'failed')),
    problem     jsonb,
    PRIMARY KEY (campaign_id, number)
);
CREATE INDEX campaign_items_under_way ON campaign_items (campaign_id) WHERE state = 'under_way';
