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
