-- A database with :n tenants, as it stands after some months: nearly all are active, a few of each other
-- state, a pool, builds, keys that were rotated, and the log of all that. psql -v n=1000000 -f load.sql
SET session_replication_role = replica; -- neither triggers nor foreign keys: all of it agrees
SET synchronous_commit = off;

INSERT INTO deployment (id, operator_user_id, keyset_probe) VALUES (repeat('d', 16), 'acme', '\x0101020304');
UPDATE current_incarnation SET control_seen_at = now(), control_due_at = 'infinity', written_by = pg_current_xact_id()::xid;
INSERT INTO callers (token_id, name, role, secret_sha256)
SELECT 'token' || i, 'caller ' || i, 'provisioner', sha256(i::text::bytea) FROM generate_series(1, 100) i;

-- Of tenants: 1 % suspended, 1 % deleted, 0.5 % being deleted, and of what passes soon a few.
CREATE TEMP TABLE made AS
SELECT i, format('user_%s', lpad(i::text, 8, '0')) AS tenant, format('tny-%s', lpad(i::text, 22, '0')) AS app,
	now() - (:n - i) * interval '300 days' / :n AS at,
	CASE WHEN i % 100 = 1 THEN 'suspended' WHEN i % 100 = 2 THEN 'deleted' WHEN i % 200 = 3 THEN 'deleting'
		WHEN i % (:n / 5) = 4 THEN 'suspending' WHEN i % (:n / 5) = 5 THEN 'resuming' WHEN i % (:n / 5) = 6 THEN 'purging'
		WHEN i % (:n / 5) = 7 THEN 'provisioning' ELSE 'active' END AS state,
	CASE WHEN i % (:n / 5) = 7 THEN 'slow' WHEN i % 10 = 0 THEN 'pro' ELSE 'default' END AS profile
FROM generate_series(1, :n) i;

INSERT INTO tenants (id, profile, state, state_since, app_id, display_name, labels, attributes_hash, created_at, updated_at)
SELECT tenant, profile, state, CASE WHEN state = 'provisioning' THEN now() ELSE at END, CASE WHEN state NOT IN ('provisioning', 'deleted') THEN app END,
	'Display name ' || i,
	jsonb_build_object('plan', CASE WHEN i % 5 = 0 THEN 'pro' ELSE 'free' END, 'org', 'org_' || i % greatest(1, :n / 100)),
	decode(repeat('00', 64), 'hex'), at, at
FROM made;

INSERT INTO apps (id, profile, profile_revision, state, tenant_id, tenant_generation, made_at, ready_at, next_attempt_at, purge_after,
	purging_since, created_at, updated_at, marked_at, extra_keys_at, marker_key_id, proven_at)
SELECT app, profile, 'revision', CASE state WHEN 'deleted' THEN 'deleted' WHEN 'deleting' THEN 'retained' WHEN 'purging' THEN 'purging' ELSE 'held' END,
	tenant, 1, at, at, at, CASE WHEN state IN ('deleting', 'purging', 'deleted') THEN now() + (i % 30 + 1) * interval '1 day' END,
	CASE WHEN state = 'purging' THEN now() WHEN state = 'deleted' THEN at END, at, at, at, at, 16909060, at
FROM made WHERE state <> 'provisioning';
INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, for_pool)
SELECT 'pool-' || p || i, p, 'revision', CASE WHEN i <= 20 THEN 'ready' ELSE 'building' END, now(), now() - i * interval '1 minute', true
FROM generate_series(1, 25) i, unnest(ARRAY['default', 'pro']) p;
-- What many restarts have left; the last pool is not marked as retired yet.
INSERT INTO apps (id, profile, profile_revision, state, incarnation, made_at, ready_at, created_at)
SELECT 'old-' || i, 'default', 'revision', CASE WHEN i <= 100 THEN 'ready' ELSE 'retired' END, gen_random_uuid(), at, at, at
FROM generate_series(1, 50000) i, LATERAL (SELECT now() - i * interval '1 hour' AS at) t;
UPDATE apps SET made_at = NULL, ready_at = NULL, for_pool = false WHERE state = 'building';
INSERT INTO pools (profile, revision, target, planned_at, sign_ups, hits, misses)
SELECT p, 'revision', 20, now(), 0, 0, 0 FROM unnest(ARRAY['default', 'pro']) p;

-- One in ten was rotated. Ids rise with time.
INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, hint, next_attempt_at, created_at, updated_at, activated_at, revoked_at, profile)
SELECT format('%s-0000-7000-8000-00000000000%s', lpad(to_hex(i), 8, '0'), k)::uuid, app, 'default',
	CASE WHEN state = 'suspending' THEN 'revoking' WHEN state = 'resuming' THEN 'creating' WHEN k = 1 OR state IN ('suspended', 'deleting', 'deleted', 'purging') THEN 'revoked' ELSE 'active' END,
	'{All}', CASE WHEN k = 1 OR state IN ('suspended', 'deleting', 'deleted', 'purging', 'resuming') THEN NULL ELSE '\x0101020304'::bytea || sha256(app::bytea) END,
	CASE WHEN state <> 'resuming' THEN sha256((app || k)::bytea) END, 'abcd', at, at, at, at,
	CASE WHEN state NOT IN ('suspending', 'resuming') AND (k = 1 OR state IN ('suspended', 'deleting', 'deleted', 'purging')) THEN at END, profile
FROM made, generate_series(1, 2) k WHERE state <> 'provisioning' AND (k = 2 OR i % 10 = 0 AND state = 'active');
INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at, profile)
SELECT gen_random_uuid(), id, 'default', 'active', '{All}', '\x0101020304'::bytea || sha256(id::bytea), sha256(id::bytea), ready_at, profile
FROM apps WHERE state = 'ready' AND id LIKE 'pool-%';

-- In all partitions, so that what is planned depends on no date.
SELECT audit_events_make_partitions(3);
INSERT INTO audit_events (at, actor, request_id, action, tenant_id, app_id, key_id, detail)
SELECT date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + interval '31 days' * (i % 5 - 1) + interval '28 days' * i / :n,
	'caller:token' || i % 100, 'request-' || i, (ARRAY['tenant.created', 'tenant.activated', 'key.revealed'])[k], tenant, app, NULL, '{"generation": 1}'
FROM made, generate_series(1, 2) k;
INSERT INTO audit_seals (number, after_id, last_id, entries, previous_hash, hash, sealed_at)
SELECT 1, 0, :n * 2 - 1000, repeat('x', 24)::bytea, repeat('x', 32)::bytea, repeat('x', 32)::bytea, now();

SELECT tenant_counts_recount();
DROP TABLE made;
RESET session_replication_role;
