-- A fleet-wide pause of upstream work: one pause and one probe for all replicas.
ALTER TABLE upstream_budget
    ADD COLUMN epoch       bigint NOT NULL DEFAULT 0,  -- grows with each pause: slots of an earlier one are void
    ADD COLUMN failures    integer NOT NULL DEFAULT 0, -- calls in a row that Clarifai failed
    ADD COLUMN pauses      integer NOT NULL DEFAULT 0, -- pauses in a row; 0 while calls flow
    ADD COLUMN probe_until timestamptz NOT NULL DEFAULT 'epoch'; -- one call tries, until then at most

-- The PATs that Clarifai refuses, by their fingerprints. A replica whose PAT is here makes no
-- calls with it, except to ask now and then whether it is still refused.
CREATE TABLE refused_pats (
    fingerprint   bytea PRIMARY KEY,
    problem       jsonb NOT NULL,
    since         timestamptz NOT NULL DEFAULT now(),
    checks        integer NOT NULL DEFAULT 0,
    next_check_at timestamptz NOT NULL
);
