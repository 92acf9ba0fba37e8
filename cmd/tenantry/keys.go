package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/tenant"
)

type keyCmd struct {
	List       keyListCmd       `cmd:"" help:"List a tenant's keys, without their secrets. Roles: all."`
	Reveal     keyRevealCmd     `cmd:"" help:"Print a key, and nothing else. Role: provisioner."`
	Add        keyAddCmd        `cmd:"" help:"Give a tenant a further key and print it. Role: provisioner."`
	Revoke     keyRevokeCmd     `cmd:"" help:"Revoke every key of a name, also one that a rotation has replaced. Roles: provisioner, admin."`
	Rotate     keyRotateCmd     `cmd:"" help:"Replace a key and print the new one; both work until the overlap ends. Role: provisioner."`
	Confirm    keyConfirmCmd    `cmd:"" help:"End a rotation's overlap now: the old key is revoked. Role: provisioner."`
	Identify   keyIdentifyCmd   `cmd:"" help:"Say whose key it is that is read from stdin, or that has a fingerprint; or whose app it is. Roles: all."`
	Quarantine keyQuarantineCmd `cmd:"" help:"Revoke a key that leaked, which is read from stdin, and make its successor. Roles: provisioner, admin."`
}

// keyFlags are those of every command about one key.
type keyFlags struct {
	apiFlags
	outputFlags
	Tenant string `arg:"" help:"The tenant's id."`
	Name   string `arg:"" help:"The key's name; that of the key that a sign-up makes is default."`
}

type keyListCmd struct {
	apiFlags
	outputFlags
	Tenant string `arg:"" help:"The tenant's id."`
}

func (c keyListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	return printList(e, c.outputFlags, 0, "keys", keyHeads(), func(int, *string) (*http.Response, error) {
		return api.ListKeys(ctx, c.Tenant, nil)
	}, func(w *table, k client.Key) { keyRow(w, k, time.Now()) })
}

func keyHeads() []string {
	return []string{"NAME", "STATE", "HINT", "SCOPES", "CREATED", "WORKS UNTIL", "ENDED", "PROBLEM"}
}

// keyRow prints a row under keyHeads.
func keyRow(w *table, k client.Key, now time.Time) {
	until := k.ExpiresAt
	if k.RetiresAt != nil && (until == nil || k.RetiresAt.Before(*until)) {
		until = k.RetiresAt
	}
	ended := ""
	if k.EndReason != nil {
		ended = strings.TrimSpace(string(*k.EndReason) + " " + ago(k.RevokedAt, now))
	}
	w.row(k.Name, k.State, k.Hint, strings.Join(k.Scopes, ","), ago(&k.CreatedAt, now), ago(until, now), ended, problemCode(k.Problem))
}

type keyRevealCmd struct{ keyFlags }

func (c keyRevealCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.Credentials](api.GetKeySecret(ctx, c.Tenant, c.Name))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	_, err = fmt.Fprintln(e.stdout, got.value.Key)
	return err
}

type keyAddCmd struct {
	keyFlags
	waitFlags
	Scope     []string      `sep:"none" placeholder:"SCOPE" help:"What it may do at Clarifai; may be given several times. Without it: as the tenant's profile says."`
	ExpiresIn time.Duration `xor:"expires" placeholder:"DURATION" help:"How long it is valid, such as 2160h. Without it: until it is revoked."`
	ExpiresAt time.Time     `xor:"expires" placeholder:"TIME" format:"2006-01-02T15:04:05Z07:00" help:"Until when it is valid, such as 2026-01-31T12:00:00Z."`
}

func (c keyAddCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	var body client.KeyRequest
	if len(c.Scope) > 0 {
		body.Scopes = &c.Scope
	}
	expires, err := expiry(time.Now(), c.ExpiresIn)
	if err != nil {
		return err
	}
	if !c.ExpiresAt.IsZero() {
		expires = c.ExpiresAt
	}
	if !expires.IsZero() {
		body.ExpiresAt = &expires
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	put := func(prefer *string) (answered[client.KeyWithCredentials], error) {
		return answer[client.KeyWithCredentials](api.PutKey(ctx, c.Tenant, c.Name, &client.PutKeyParams{Prefer: prefer}, body))
	}
	first, err := put(c.prefer())
	if err != nil {
		return err
	}
	// The same PUT again, which finds the key.
	last, err := follow(ctx, e, c.waitFlags, first, func(k client.KeyWithCredentials) (bool, error) {
		return k.State != client.KeyState(tenant.KeyCreating), nil
	}, func(k client.KeyWithCredentials) string {
		text := fmt.Sprintf("key %s of tenant %s is still being made", k.Name, c.Tenant)
		if k.Problem != nil {
			text += " (" + shownProblem(k.Problem, time.Now()) + ")"
		}
		return text
	}, func(seconds *int) (answered[client.KeyWithCredentials], error) {
		prefer := fmt.Sprintf("wait=%d", *seconds)
		return put(&prefer)
	})
	k := last.value
	err = unread(last, k.State != client.KeyState(tenant.KeyCreating), err)
	if c.json() {
		return errors.Join(printBody(e.stdout, last.body), err)
	}
	if k.Credentials != nil {
		_, _ = fmt.Fprintln(e.stdout, k.Credentials.Key)
	}
	_, _ = fmt.Fprintf(e.stderr, "key %s of tenant %s is %s, scopes %s, expires %s\n", k.Name, c.Tenant, k.State, strings.Join(k.Scopes, ","),
		orNever(exactly(k.ExpiresAt, time.Now())))
	return err
}

// unread returns the error of a command whose key works, and could not be read for the response.
func unread[T any](a answered[T], works bool, err error) error {
	if err == nil && works && a.pending() {
		return laterError{errors.New("the key works, and could not be read: run the same command again, with the same --id for a rotation")}
	}
	return err
}

func orNever(text string) string { return textOr(&text, "never") }

type keyRevokeCmd struct {
	keyFlags
	waitFlags
}

func (c keyRevokeCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	first, err := answer[client.Key](api.RevokeKey(ctx, c.Tenant, c.Name, &client.RevokeKeyParams{Prefer: c.prefer()}))
	if err != nil {
		return err
	}
	// Not the same DELETE again: it would revoke what was made meanwhile under this name.
	last, err := follow(ctx, e, c.waitFlags, first, func(k client.Key) (bool, error) {
		return k.Id != first.value.Id || k.State != client.KeyState(tenant.KeyRevoking), nil
	}, func(k client.Key) string {
		text := fmt.Sprintf("key %s of tenant %s is still being revoked", k.Name, c.Tenant)
		if k.Problem != nil {
			text += " (" + shownProblem(k.Problem, time.Now()) + ")"
		}
		return text
	}, func(*int) (answered[client.Key], error) {
		return answer[client.Key](api.GetKey(ctx, c.Tenant, c.Name, nil))
	})
	if c.json() {
		return errors.Join(printBody(e.stdout, last.body), err)
	}
	w := newTable(e.stdout, keyHeads()...)
	keyRow(w, last.value, time.Now())
	return errors.Join(w.flush(), err)
}

type keyRotateCmd struct {
	keyFlags
	waitFlags
	RotationID string        `name:"id" placeholder:"ID" help:"Your id for the rotation: the same command again finds the same rotation and the same new key. Without it one is made up and printed."`
	Overlap    time.Duration `default:"24h" help:"How long the old key works on, at most 720h."`
}

func (c keyRotateCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	if c.RotationID == "" {
		c.RotationID = uuid.NewString()
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	var body client.RotationRequest
	body.Overlap = new(client.Duration)
	if err := body.Overlap.FromDuration1(c.Overlap.String()); err != nil {
		return err
	}
	put := func(prefer *string) (answered[client.Rotation], error) {
		return answer[client.Rotation](api.PutRotation(ctx, c.Tenant, c.Name, c.RotationID, &client.PutRotationParams{Prefer: prefer}, body))
	}
	first, err := put(c.prefer())
	if err != nil {
		if exitOf(err) == exitLater { // it may be under way
			return fmt.Errorf("%w; the same command with --id %s finds the rotation if there is one", err, c.RotationID)
		}
		return err
	}
	// The same PUT again, which finds the rotation.
	last, err := follow(ctx, e, c.waitFlags, first, func(r client.Rotation) (bool, error) {
		return r.State != client.RotationState(tenant.RotationCreating), nil
	}, func(r client.Rotation) string {
		text := fmt.Sprintf("the new key of rotation %s is still being made, and the old one works", r.Id)
		if r.Problem != nil {
			text += " (" + shownProblem(r.Problem, time.Now()) + ")"
		}
		return text
	}, func(seconds *int) (answered[client.Rotation], error) {
		prefer := fmt.Sprintf("wait=%d", *seconds)
		return put(&prefer)
	})
	r := last.value
	err = unread(last, r.State != client.RotationState(tenant.RotationCreating), err)
	if c.json() {
		return errors.Join(printBody(e.stdout, last.body), err)
	}
	if r.Credentials != nil {
		_, _ = fmt.Fprintln(e.stdout, r.Credentials.Key)
	}
	switch r.State {
	case client.RotationState(tenant.RotationOverlapping):
		_, _ = fmt.Fprintf(e.stderr, "rotation %s: both keys work; the old one stops %s, or with tenantry key confirm %s %s %s\n",
			r.Id, exactly(r.RetiresAt, time.Now()), c.Tenant, c.Name, r.Id)
	default:
		_, _ = fmt.Fprintf(e.stderr, "rotation %s is %s\n", r.Id, r.State)
	}
	return err
}

type keyConfirmCmd struct {
	keyFlags
	Rotation string `arg:"" help:"The rotation's id."`
}

func (c keyConfirmCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.Rotation](api.ConfirmRotation(ctx, c.Tenant, c.Name, c.Rotation))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	return printKeys(e, got.value.OldKey, got.value.NewKey)
}

func printKeys(e env, keys ...client.Key) error {
	w := newTable(e.stdout, keyHeads()...)
	for _, k := range keys {
		keyRow(w, k, time.Now())
	}
	return w.flush()
}

type keyIdentifyCmd struct {
	apiFlags
	outputFlags
	Fingerprint string `xor:"what" placeholder:"HEX" help:"Look for the key of this fingerprint, as JSON lists of keys have it, and read nothing from stdin."`
	App         string `xor:"what" placeholder:"ID" help:"Look for this app instead, with its keys."`
}

func (c keyIdentifyCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	body := client.IdentifyRequest{Fingerprint: given(c.Fingerprint), AppId: given(c.App)}
	if body == (client.IdentifyRequest{}) {
		leaked, err := e.readSecret("the key")
		if err != nil {
			return err
		}
		text := leaked.Reveal()
		body.Key = &text
	}
	got, err := answer[client.IdentifiedKey](api.IdentifyKey(ctx, body))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	return printIdentified(e, got.value)
}

func printIdentified(e env, k client.IdentifiedKey) error {
	w := newTable(e.stdout)
	w.row("tenant", textOr(k.TenantId, noTenant(k)))
	w.row("app", fmt.Sprintf("%s (%s)", k.AppId, k.AppState))
	keys := []client.AgedKey{}
	if k.Key != nil {
		keys = append(keys, *k.Key)
	}
	if k.Keys != nil {
		keys = append(keys, *k.Keys...)
	}
	for _, k := range keys {
		text := fmt.Sprintf("%s …%s, %s, age %s", k.Name, k.Hint, k.State, span(time.Duration(k.AgeSeconds)*time.Second))
		if k.EndReason != nil {
			text += ", " + string(*k.EndReason) + " " + ago(k.RevokedAt, time.Now())
		}
		w.row("key", text)
	}
	return w.flush()
}

// noTenant says why an app has no tenant.
func noTenant(k client.IdentifiedKey) string {
	if k.AppState == client.AppStateRetired {
		return "unknown: the app is retired, since it is from before a restart or restore of the database"
	}
	return "none: the app waits in the pool"
}

type keyQuarantineCmd struct {
	apiFlags
	outputFlags
	waitFlags
	Yes bool `help:"Revoke it without asking."`
}

func (c keyQuarantineCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	if !c.Yes && !e.onTerminal(e.stdin) { // before the key is asked for
		return usagef("the key is revoked at once: say --yes if you mean it")
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	leaked, err := e.readSecret("the key")
	if err != nil {
		return err
	}
	text := leaked.Reveal()
	if !c.Yes {
		is, err := answer[client.IdentifiedKey](api.IdentifyKey(ctx, client.IdentifyRequest{Key: &text}))
		p, refused := errors.AsType[*apiProblem](err)
		unknown := refused && p.status == http.StatusNotFound
		if err != nil && !unknown {
			return err
		}
		owner := textOr(is.value.TenantId, "")
		question, word := "the app "+is.value.AppId+" waits in the pool: its key is revoked at once, and it is removed", textOr(is.value.TenantId, is.value.AppId)
		switch {
		case unknown:
			question, word = "the database does not know this key, and may have lost its row. If the key opens one of Tenantry's apps, it is revoked at once", "quarantine"
		case is.value.AppState == client.AppStateRetired:
			question = "the app " + is.value.AppId + " is retired, and may belong to a lost tenant: its key is revoked at once"
		case owner != "" && is.value.Key != nil:
			question = fmt.Sprintf("the key %s of tenant %s is revoked at once, and another is made", is.value.Key.Name, owner)
		}
		if err := e.confirm(false, question, word); err != nil {
			return err
		}
	}
	first, err := c.quarantine(ctx, api, text)
	if err != nil {
		return err
	}
	if first.value.TenantId == nil { // nobody has the app, nor waits for its key
		c.NoWait = true
	}
	// Not the same POST again, of which each writes an event.
	last, err := follow(ctx, e, c.waitFlags, first, func(q client.Quarantine) (bool, error) {
		return q.Key.State != client.KeyState(tenant.KeyRevoking) && (q.Successor == nil || q.Successor.State != client.KeyState(tenant.KeyCreating)), nil
	}, func(q client.Quarantine) string {
		if q.Key.State == client.KeyState(tenant.KeyRevoking) {
			return fmt.Sprintf("key %s of tenant %s is still being revoked", q.Key.Name, *q.TenantId)
		}
		return fmt.Sprintf("key %s of tenant %s is revoked, and its successor is still being made", q.Key.Name, *q.TenantId)
	}, func(*int) (answered[client.Quarantine], error) {
		return quarantined(ctx, api, first)
	})
	if c.json() {
		return errors.Join(printBody(e.stdout, last.body), err)
	}
	keys := []client.Key{last.value.Key}
	if last.value.Successor != nil {
		keys = append(keys, *last.value.Successor)
	}
	return errors.Join(printKeys(e, keys...), err)
}

// quarantine requests the quarantine, and repeats the request while Tenantry asks Clarifai for the
// app of an unknown key.
func (c keyQuarantineCmd) quarantine(ctx context.Context, api *client.ClientWithResponses, key string) (answered[client.Quarantine], error) {
	for deadline := time.Now().Add(c.limit()); ; {
		q, err := answer[client.Quarantine](api.QuarantineKey(ctx, &client.QuarantineKeyParams{Prefer: c.prefer()}, client.QuarantineRequest{Key: key}))
		p, ok := errors.AsType[*apiProblem](err)
		if !ok || p.Code != "quarantine_pending" || !time.Now().Before(deadline) {
			return q, err
		}
		select {
		case <-ctx.Done():
			return q, err
		case <-time.After(pollPause):
		}
	}
}

// quarantined looks at the keys of a quarantine.
func quarantined(ctx context.Context, api *client.ClientWithResponses, q answered[client.Quarantine]) (answered[client.Quarantine], error) {
	list, err := answer[client.KeyList](api.ListKeys(ctx, *q.value.TenantId, nil))
	if err != nil {
		return q, err
	}
	for _, k := range list.value.Keys {
		switch {
		case k.Id == q.value.Key.Id:
			q.value.Key = k
		case q.value.Successor != nil && k.Id == q.value.Successor.Id:
			q.value.Successor = &k
		}
	}
	q.body, err = json.Marshal(q.value)
	return q, err
}
