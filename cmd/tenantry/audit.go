package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/tenant"
)

type auditCmd struct {
	List   auditListCmd   `cmd:"" help:"List events, newest first, through a running service. Roles: admin, viewer."`
	Verify auditVerifyCmd `cmd:"" help:"Compare the audit log in the database with its seals. Exit code 3 if something was altered, removed or inserted."`
	Anchor auditAnchorCmd `cmd:"" help:"Print the last seal, to be kept where the database's administrators cannot change it: verify --anchor compares it."`
}

type auditListCmd struct {
	apiFlags
	outputFlags
	Tenant    string    `placeholder:"ID" help:"Only events about this tenant."`
	App       string    `placeholder:"ID" help:"Only events about this app."`
	Key       uuid.UUID `placeholder:"UUID" help:"Only events about the key of this id."`
	Actor     string    `placeholder:"ACTOR" help:"Only events of this actor: caller:<token id>, worker or operator."`
	Action    string    `placeholder:"ACTION" help:"Only events of this action, such as key.revealed."`
	RequestID string    `placeholder:"ID" help:"Only events of the request with this X-Request-Id."`
	After     time.Time `placeholder:"TIME" format:"2006-01-02T15:04:05Z07:00" help:"Only events from then on, such as 2026-01-31T12:00:00Z."`
	Before    time.Time `placeholder:"TIME" format:"2006-01-02T15:04:05Z07:00" help:"Only events before then."`
	Order     string    `enum:"desc,asc" default:"desc" help:"By event id: desc is newest first, asc oldest first. asc lists an event only when no event with a lower id can appear."`
	Limit     int       `default:"100" help:"Most events to print; 0 means all."`
}

func (c auditListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	order := client.ListAuditParamsOrder(c.Order)
	ask := client.ListAuditParams{Tenant: given(c.Tenant), App: given(c.App), KeyId: given(c.Key), Actor: given(c.Actor),
		Action: given(c.Action), RequestId: given(c.RequestID), After: given(c.After), Before: given(c.Before), Order: &order}
	heads := []string{"ID", "AT", "ACTOR", "ACTION", "TENANT", "APP", "REQUEST", "DETAIL"}
	return printList(e, c.outputFlags, c.Limit, "events", heads, func(size int, cursor *string) (*http.Response, error) {
		ask.Limit, ask.Cursor = &size, cursor
		return api.ListAudit(ctx, &ask)
	}, func(w *table, e auditEvent) {
		w.row(e.Id, shownTime(e.At, "-"), e.Actor, e.Action, textOr(e.TenantId, ""), textOr(e.AppId, ""), textOr(e.RequestId, ""), string(e.Detail))
	})
}

// An auditEvent has its detail as the API wrote it.
type auditEvent struct {
	client.AuditEvent
	Detail json.RawMessage `json:"detail"`
}

// An anchor is a seal as it is kept outside of the database.
type anchor struct {
	Deployment string    `json:"deployment"`
	Seal       int64     `json:"seal"`
	UpToEvent  int64     `json:"up_to_event"`
	Hash       string    `json:"hash"`
	SealedAt   time.Time `json:"sealed_at"`
}

type auditAnchorCmd struct {
	databaseFlags
}

func (c auditAnchorCmd) Run(ctx context.Context, e env) error {
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	seal, err := db.AuditSeal(ctx, 0)
	if errors.Is(err, tenant.NotFound) {
		return errors.New("nothing is sealed yet: a running service seals the audit log within a minute")
	}
	if err != nil {
		return err
	}
	if !seal.Intact() {
		return fmt.Errorf("seal %d was altered: run `tenantry audit verify`", seal.Number)
	}
	deployment, err := db.Deployment(ctx)
	if err != nil && !errors.Is(err, tenant.NotFound) {
		return err
	}
	return printJSON(e.stdout, anchor{Deployment: deployment.ID, Seal: seal.Number, UpToEvent: seal.LastID, Hash: hex.EncodeToString(seal.Hash),
		SealedAt: seal.SealedAt.UTC()})
}

type auditVerifyCmd struct {
	databaseFlags
	Anchor   string `placeholder:"FILE" help:"A seal from \"tenantry audit anchor\": shows also whether events and their seals were replaced together, up to that seal."`
	FromSeal int64  `default:"1" help:"Begin at this seal: for a log whose oldest partitions were dropped."`
}

func (c auditVerifyCmd) Run(ctx context.Context, e env) error {
	if c.FromSeal < 1 {
		return usagef("--from-seal must be 1 or more")
	}
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	p := auditPrinter{e: e}
	if c.Anchor != "" {
		kept, err := readAnchor(c.Anchor)
		if err != nil {
			return err
		}
		deployment, err := db.Deployment(ctx)
		if err != nil && !errors.Is(err, tenant.NotFound) {
			return err
		}
		if deployment.ID != kept.Deployment {
			return fmt.Errorf("--anchor: %s is of the deployment %q, and this database belongs to %q", c.Anchor, kept.Deployment, deployment.ID)
		}
		if kept.Seal < c.FromSeal {
			return fmt.Errorf("--anchor: it is of seal %d, which --from-seal %d leaves out", kept.Seal, c.FromSeal)
		}
		seal, err := db.AuditSeal(ctx, kept.Seal)
		switch {
		case errors.Is(err, tenant.NotFound):
			p.line("anchor", kept.Seal, "the database has no such seal: it was removed, or the database was restored from an older backup")
		case err != nil:
			return err
		case hex.EncodeToString(seal.Hash) != kept.Hash || seal.LastID != kept.UpToEvent:
			p.line("anchor", kept.Seal, "the database's seal is another: events up to %d and their seals were replaced after %s", kept.UpToEvent, shownTime(kept.SealedAt, "-"))
		}
	}
	if _, err := db.AuditSeal(ctx, c.FromSeal); c.FromSeal > 1 && errors.Is(err, tenant.NotFound) {
		return fmt.Errorf("--from-seal: there is no seal %d", c.FromSeal)
	}
	check, err := db.VerifyAudit(ctx, c.FromSeal, p.print)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(e.stderr, "seals: %d, events: %d, faults: %d, events not sealed yet: %d\n", check.Seals, check.Sealed, p.n, check.Unsealed)
	if check.Seals > 0 {
		_, _ = fmt.Fprintf(e.stderr, "the last seal is %d, up to event %d, of %s\n", check.LastSeal.Number, check.LastSeal.LastID, shownTime(check.LastSeal.SealedAt, "-"))
	}
	if p.n > 0 {
		return errDiffers
	}
	return nil
}

func readAnchor(file string) (anchor, error) {
	var a anchor
	raw, err := os.ReadFile(file)
	if err != nil {
		return a, fmt.Errorf("--anchor: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&a); err != nil || a.Seal < 1 || len(a.Hash) != hex.EncodedLen(len(tenant.NoAuditSeal)) {
		return a, fmt.Errorf("--anchor: %s is not what `tenantry audit anchor` prints", file)
	}
	return a, nil
}

// An auditPrinter prints faults of the audit log as they are found. What stands in
// a forged event is quoted: it may be made to be misread on a terminal.
type auditPrinter struct {
	e env
	n int
}

func (p *auditPrinter) line(fault string, of int64, format string, args ...any) {
	p.n++
	_, _ = fmt.Fprintf(p.e.stdout, "%-14s  %d  %s\n", fault, of, fmt.Sprintf(format, args...))
}

func (p *auditPrinter) print(f tenant.AuditFinding) {
	sealed := fmt.Sprintf("sealed in %d of %s", f.Seal.Number, shownTime(f.Seal.SealedAt, "-"))
	fault := string(f.Fault)
	switch f.Fault {
	case tenant.EventAltered:
		p.line(fault, f.EventID, "%s; now it reads %s", sealed, shownEvent(f.Event))
	case tenant.EventRemoved:
		p.line(fault, f.EventID, "%s", sealed)
	case tenant.EventInserted:
		p.line(fault, f.EventID, "not there when its place was %s; it reads %s", sealed, shownEvent(f.Event))
	case tenant.SealMissing:
		p.line(fault, f.Seal.Number, "to %d: the events that they covered cannot be checked", f.UpTo)
	case tenant.SealAltered:
		p.line(fault, f.Seal.Number, "what it says of the events %d to %d proves nothing", f.Seal.AfterID+1, f.Seal.LastID)
	case tenant.SealUnchained:
		p.line(fault, f.Seal.Number, "it does not follow seal %d: one of the two was replaced", f.Seal.Number-1)
	default:
		p.line(fault, f.Seal.Number, "%s", sealed)
	}
}

func shownEvent(e *tenant.AuditEvent) string {
	text := fmt.Sprintf("%s %q by %q", e.At.Format(time.RFC3339), e.Action, e.Actor)
	for _, of := range []struct{ name, id string }{{"tenant", string(e.TenantID)}, {"app", string(e.AppID)}, {"request", e.RequestID}} {
		if of.id != "" {
			text += fmt.Sprintf(", %s %q", of.name, of.id)
		}
	}
	return text
}
