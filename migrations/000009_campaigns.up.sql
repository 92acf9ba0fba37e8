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
