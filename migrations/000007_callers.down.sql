DROP INDEX callers_created;
ALTER TABLE callers
    DROP COLUMN labels,
    DROP COLUMN rate_limit,
    DROP COLUMN replaced_by;
