-- A caller with labels sees and changes only the tenants that have all of them. The hash of its token
-- is hashed once more: code that does not know of the limit finds no such token, and takes it for no
-- other.
ALTER TABLE callers
    ADD COLUMN labels      jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT callers_labels CHECK (jsonb_typeof(labels) = 'object'),
    ADD COLUMN rate_limit  integer CONSTRAINT callers_rate_limit CHECK (rate_limit BETWEEN 1 AND 10000),
    ADD COLUMN replaced_by text CONSTRAINT callers_replaced_by REFERENCES callers (token_id);
CREATE INDEX callers_created ON callers (created_at, token_id);
