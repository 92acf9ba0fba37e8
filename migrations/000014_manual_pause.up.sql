-- The pause of work at Clarifai by an operator, for an incident; no row while there is none. Only an
-- operator ends it, unlike the pauses in upstream_budget.
CREATE TABLE manual_pause (
    one       boolean PRIMARY KEY DEFAULT true CONSTRAINT manual_pause_one CHECK (one),
    scope     text NOT NULL CONSTRAINT manual_pause_scope CHECK (scope IN ('all', 'removals')),
    reason    text NOT NULL CONSTRAINT manual_pause_reason CHECK (reason <> ''),
    paused_by text NOT NULL,
    since     timestamptz NOT NULL DEFAULT now()
);
