DROP TABLE refused_pats;
ALTER TABLE upstream_budget
    DROP COLUMN epoch,
    DROP COLUMN failures,
    DROP COLUMN pauses,
    DROP COLUMN probe_until;
