-- The pool: one row for each profile that keeps apps ready ahead of need.
CREATE TABLE pools (
    profile     text COLLATE "C" PRIMARY KEY,
    revision    text NOT NULL,    -- of the profile, as the replicas have it that keep the pool
    target      integer NOT NULL CONSTRAINT pools_target CHECK (target >= 0),
    planned_at  timestamptz NOT NULL,
    above_since timestamptz,      -- since when more apps are ready than the target says
    sign_ups    integer NOT NULL, -- of the hour before planned_at
    hits        integer NOT NULL, -- and how many of them had their app at once
    misses      integer NOT NULL
);

ALTER TABLE apps
    -- Built for the pool: a tenant that waits has a build of its own.
    ADD COLUMN for_pool  boolean NOT NULL DEFAULT false,
    -- When its key was last known to work; null since it was made.
    ADD COLUMN proven_at timestamptz;
CREATE INDEX apps_to_prove ON apps ((coalesce(proven_at, ready_at))) WHERE state = 'ready';
