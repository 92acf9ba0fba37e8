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
