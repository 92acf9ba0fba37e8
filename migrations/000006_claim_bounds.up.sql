-- Since when a profile has a ready app, or a tenant that waits, at all: where a claim begins to look.
-- It is reckoned anew with each plan; what is older in the indexes is dead.
ALTER TABLE pools
    ADD COLUMN ready_from   timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN waiting_from timestamptz NOT NULL DEFAULT '-infinity';
