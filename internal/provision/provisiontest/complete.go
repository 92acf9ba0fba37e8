package provisiontest

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// watchEvents has the database refuse each transaction of a replica that changes what
// look-ups show and writes no event of it: what is held in memory would stay as it was.
// What tests do to the rows themselves is left alone.
const watchEvents = `
CREATE OR REPLACE FUNCTION test_needs_event(whose text, has boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	IF NOT has THEN
		RAISE EXCEPTION 'no event tells that % has changed', whose USING ERRCODE = 'triggered_action_exception';
	END IF;
END $$;

CREATE OR REPLACE FUNCTION test_tenants_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') = 'tenantry' AND (TG_OP = 'INSERT' OR
		(OLD.generation, OLD.state, OLD.profile, OLD.app_id, OLD.app_user_id, OLD.display_name, OLD.labels, OLD.deletion_protection, OLD.problem, OLD.version)
		IS DISTINCT FROM
		(NEW.generation, NEW.state, NEW.profile, NEW.app_id, NEW.app_user_id, NEW.display_name, NEW.labels, NEW.deletion_protection, NEW.problem, NEW.version)) THEN
		PERFORM test_needs_event('the tenant ' || NEW.id, EXISTS (SELECT FROM audit_events
			WHERE tenant_id = NEW.id AND at = now() AND transaction_id = pg_current_xact_id()));
	END IF;
	RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION test_apps_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') = 'tenantry' AND NEW.tenant_id IS NOT NULL AND (TG_OP = 'INSERT' OR OLD.tenant_id IS NULL) THEN
		PERFORM test_needs_event('the app ' || NEW.id, EXISTS (SELECT FROM audit_events
			WHERE app_id = NEW.id AND at = now() AND transaction_id = pg_current_xact_id()));
	END IF;
	RETURN NULL;
END $$;

-- A list with a key that is being made or revoked, or is lost, is not held.
CREATE OR REPLACE FUNCTION test_keys_events() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	owner text;
BEGIN
	IF current_setting('application_name') <> 'tenantry' THEN
		RETURN NULL;
	END IF;
	IF TG_OP = 'UPDATE' THEN
		IF NEW.state IN ('creating', 'revoking', 'lost') AND OLD.state IN ('creating', 'revoking', 'lost') THEN
			RETURN NULL;
		END IF;
		IF (OLD.name, OLD.state, OLD.hint, OLD.scopes, OLD.activated_at, OLD.revoked_at, OLD.expires_at, OLD.retires_at, OLD.fingerprint, OLD.end_reason, OLD.problem)
			IS NOT DISTINCT FROM
			(NEW.name, NEW.state, NEW.hint, NEW.scopes, NEW.activated_at, NEW.revoked_at, NEW.expires_at, NEW.retires_at, NEW.fingerprint, NEW.end_reason, NEW.problem) THEN
			RETURN NULL;
		END IF;
	END IF;
	SELECT id INTO owner FROM tenants WHERE app_id = NEW.app_id;
	IF FOUND THEN
		PERFORM test_needs_event('the key ' || NEW.name || ' of ' || owner || ', which is ' || NEW.state || ',', EXISTS (SELECT FROM audit_events
			WHERE tenant_id = owner AND at = now() AND transaction_id = pg_current_xact_id()));
	END IF;
	RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION test_callers_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('application_name') = 'tenantry' AND (TG_OP = 'INSERT' OR
		(OLD.name, OLD.role, OLD.secret_sha256, OLD.expires_at, OLD.revoked_at, OLD.labels, OLD.rate_limit, OLD.replaced_by)
		IS DISTINCT FROM
		(NEW.name, NEW.role, NEW.secret_sha256, NEW.expires_at, NEW.revoked_at, NEW.labels, NEW.rate_limit, NEW.replaced_by)) THEN
		PERFORM test_needs_event('the caller ' || NEW.token_id, EXISTS (SELECT FROM audit_events
			WHERE action LIKE 'token.%' AND detail->>'token_id' = NEW.token_id AND at = now() AND transaction_id = pg_current_xact_id()));
	END IF;
	RETURN NULL;
END $$;

DO $$
DECLARE
	watched text;
BEGIN
	FOREACH watched IN ARRAY ARRAY['tenants', 'apps', 'keys', 'callers'] LOOP
		EXECUTE format('DROP TRIGGER IF EXISTS test_events ON %I', watched);
		EXECUTE format('CREATE CONSTRAINT TRIGGER test_events AFTER INSERT OR UPDATE ON %I DEFERRABLE INITIALLY DEFERRED
			FOR EACH ROW EXECUTE FUNCTION %I()', watched, 'test_' || watched || '_events');
	END LOOP;
END $$`

func installWatch(ctx context.Context, url tenant.Secret) error {
	conn, err := pgx.Connect(ctx, url.Reveal())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	_, err = conn.Exec(ctx, watchEvents)
	return err
}
