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
