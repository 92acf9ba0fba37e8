package provision

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// The control record is the metadata of one app of the account. Each database renews it, so
// that a restart of the database can be told from a rollback and from a copy.

// beat registers this replica, starts the next incarnation if the fingerprint of the database has
// changed, and starts due work.
func (s *Service) beat(ctx context.Context) error {
	_, pat, _ := s.PAT.current()
	b, err := s.Store.Beat(ctx, pat)
	if err != nil {
		return err
	}
	s.logRecovery(b.Recovery)
	s.logPause(b.Pause)
	if b.ClockStep > 0 {
		s.Log.Warn("clock of the database was set back; the times of all work were corrected", zap.Duration("by", b.ClockStep))
	}
	if b.Retiring {
		n, err := s.Store.RetireApps(ctx)
		if err != nil {
			return err
		}
		if n > 0 {
			s.Log.Warn("apps retired: they are from an earlier incarnation of the database and are never handed out", zap.Int("apps", n))
		}
	}
	if b.ControlDue {
		s.wakeControl()
	}
	return nil
}

// wakeControl makes KeepControl check for due work now.
func (s *Service) wakeControl() {
	select {
	case s.controlDue <- struct{}{}:
	default: // a wake-up is pending
	}
}

// logRecovery logs each change of recovery mode once in this replica.
func (s *Service) logRecovery(is tenant.Recovery) {
	s.recoveryMu.Lock()
	was := s.recovery
	s.recovery = is
	s.recoveryMu.Unlock()
	if was.Incarnation == is.Incarnation && was.State == is.State || was.Incarnation == uuid.Nil && !is.Active() {
		return
	}
	fields := []zap.Field{zap.Stringer("incarnation", is.Incarnation), zap.String("reason", is.Reason)}
	switch is.State {
	case tenant.Watching:
		s.Log.Warn("recovery mode: watching whether another database is in use", append(fields, zap.Time("until", is.WatchUntil))...)
	case tenant.Recovering:
		s.Log.Error("recovery mode: transactions were lost; run `tenantry recover show`", append(fields, zap.String("lost", is.Lost))...)
	case tenant.Stopped:
		s.Log.Error("recovery mode: another database is in use, no work is done at Clarifai here; if this database is a copy, stop this service or set TENANTRY_READ_ONLY=true; see docs/recovery.md", fields...)
	case tenant.NotRecovering:
		s.Log.Info("recovery mode has ended", fields...)
	}
}

// logPause logs once in this replica that an operator has paused work at Clarifai, changed the pause or
// ended it.
func (s *Service) logPause(is tenant.UpstreamPause) {
	s.recoveryMu.Lock()
	was := s.pause
	s.pause = is
	s.recoveryMu.Unlock()
	fields := func(p tenant.UpstreamPause) []zap.Field {
		return []zap.Field{zap.String("scope", string(p.Scope)), zap.String("reason", p.Reason), zap.String("paused_by", p.By), zap.Time("since", p.Since)}
	}
	switch {
	case was.Scope == is.Scope && was.Reason == is.Reason:
	case is.Scope == "":
		s.Log.Info("pause of upstream work ended by an operator", fields(was)...)
	default:
		s.Log.Warn("upstream work paused by an operator", fields(is)...)
	}
}

// logAnswers logs the end of a pause that began since Clarifai failed.
func (s *Service) logAnswers() {
	s.recoveryMu.Lock()
	paused := s.pause.Scope == tenant.PauseAll
	s.recoveryMu.Unlock()
	if paused {
		s.Log.Info("Clarifai answers again; upstream work stays paused by an operator")
		return
	}
	s.Log.Info("Clarifai answers again; upstream work goes on")
}

// incarnation is the current incarnation as this replica last saw it, for ownership tags.
func (s *Service) incarnation() string {
	s.recoveryMu.Lock()
	defer s.recoveryMu.Unlock()
	if s.recovery.Incarnation == uuid.Nil {
		return ""
	}
	return s.recovery.Incarnation.String()
}

// KeepControl reads and renews the control record, and asks Clarifai which apps unknown keys open,
// until ctx ends.
func (s *Service) KeepControl(ctx context.Context) error {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.controlDue:
		case <-time.After(s.SweepEvery):
		}
		err := s.control(ctx)
		// Without a due turn or a permit there is nothing new to log.
		if _, ok := errors.AsType[*deferred](err); !ok && !errors.Is(err, tenant.NotFound) && ctx.Err() == nil {
			if err != nil && !failing {
				s.Log.Warn("control record cannot be read or written; retrying", zap.Error(err))
			}
			failing = err != nil
		}
		// One key at a time: the checks of many keys must not delay the renewal of the record, or the
		// watch of a copy would end.
		asked, err := s.askUnknownKey(ctx)
		if err != nil && ctx.Err() == nil {
			s.Log.Warn("check of unknown key failed; retrying", zap.Error(err))
		}
		if asked {
			s.wakeControl()
		}
	}
}

// control takes a turn at the control record. It reports tenant.NotFound if no turn is due.
func (s *Service) control(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.WorkTimeout)
	defer cancel()
	t, err := s.Store.LeaseControl(ctx, false)
	if err != nil {
		return err
	}
	err = s.useControl(ctx, t)
	if err == nil {
		return nil
	}
	// The next regular turn may be a minute away, and the first build waits for it.
	again := controlRetry
	if d, ok := errors.AsType[*deferred](err); ok {
		again = d.bounded()
	}
	recording, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	return errors.Join(err, s.Store.DeferControl(recording, t, again))
}

// controlRetry is the delay after a failed turn.
const controlRetry = 2 * time.Second

// useControl reads the control record in a turn, and writes it.
func (s *Service) useControl(ctx context.Context, t tenant.ControlTurn) error {
	record, exists, err := s.readControl(ctx)
	if err != nil {
		return errors.Join(err, s.controlFailed(ctx, t, err))
	}
	is, write, err := s.Store.ExamineControl(ctx, t, record)
	if err != nil {
		return err
	}
	s.logRecovery(is)
	if !write {
		return nil
	}
	return s.writeControl(ctx, t, exists, "")
}

// readControl reads the control record; nil if there is none. It also reports whether the app of
// the record exists.
func (s *Service) readControl(ctx context.Context) (record *tenant.ControlRecord, exists bool, err error) {
	id := tenant.ControlID(s.AppPrefix, s.Deployment.ID)
	var app tenant.UpstreamApp
	err = s.callControl(ctx, func(ctx context.Context) (err error) {
		app, err = s.Upstream.App(ctx, id)
		return err
	})
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound:
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("read control record: %w", err)
	case app.Marker == nil:
		return nil, true, nil
	case app.Marker.Deployment != s.Deployment.ID:
		return nil, true, &standing{tenant.Problem{Code: "control_record_taken", Since: time.Now().UTC(),
			Detail: fmt.Sprintf("the app %s, whose metadata would be the control record, belongs to the deployment %.32q: choose another app prefix", id, app.Marker.Deployment)}}
	}
	return app.Marker.Control, true, nil
}

// callControl makes a call for the control record, which a stopped database makes too.
func (s *Service) callControl(ctx context.Context, f func(context.Context) error) error {
	_, fingerprint, verified := s.PAT.current()
	if !verified {
		if err := s.verifyPAT(ctx); err != nil {
			return err
		}
		_, fingerprint, _ = s.PAT.current()
	}
	t, err := s.takeSlot(ctx, incident, tenant.SlotRequest{PAT: fingerprint, Control: true})
	if err != nil {
		return err
	}
	return s.send(ctx, t, f)
}

// writeControl writes the control record of a turn, and records whether it could.
func (s *Service) writeControl(ctx context.Context, t tenant.ControlTurn, exists bool, stopped string) error {
	id := tenant.ControlID(s.AppPrefix, s.Deployment.ID)
	marker := tenant.Marker{Deployment: s.Deployment.ID, App: id, Incarnation: t.Incarnation.String(), Control: &tenant.ControlRecord{
		Incarnation: t.Incarnation.String(), Replica: t.Replica.String(), Seq: strconv.FormatInt(t.Seq, 10),
		Event: strconv.FormatInt(t.Event, 10), Stopped: stopped}}
	err := s.callControl(ctx, func(ctx context.Context) error {
		if exists {
			return s.Upstream.MarkApp(ctx, id, marker, "")
		}
		return s.Upstream.CreateApp(ctx, tenant.NewApp{ID: id, BaseWorkflow: "Empty", Description: controlDescription, Marker: marker})
	})
	if tenant.ClassOf(err) == tenant.UpstreamDuplicate { // the response of an earlier call was lost
		return s.writeControl(ctx, t, true, stopped)
	}
	if err != nil {
		return errors.Join(err, s.controlFailed(ctx, t, err))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	return s.Store.ControlWritten(ctx, t, nil)
}

// controlFailed records why the control record could not be read or written. It records nothing for
// other failures.
func (s *Service) controlFailed(ctx context.Context, t tenant.ControlTurn, failed error) error {
	problem := s.controlProblem(ctx, t, failed)
	if problem == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	return s.Store.ControlWritten(ctx, t, problem)
}

// controlProblem returns the problem of a failed turn, or nil if there is none to record.
func (s *Service) controlProblem(ctx context.Context, t tenant.ControlTurn, failed error) *tenant.Problem {
	if errors.Is(ctx.Err(), context.Canceled) { // this replica stops
		return nil
	}
	// A problem lets the first build start without the control record. So before the first record, only
	// a failure that retries cannot solve is a problem.
	first := t.ControlSeenAt.IsZero() && !t.Active()
	if stands, ok := errors.AsType[*standing](failed); ok {
		if t.ControlProblem != nil && t.ControlProblem.Code == stands.problem.Code {
			stands.problem.Since = t.ControlProblem.Since
		}
		return &stands.problem
	}
	if up := asUpstream(failed); up != nil {
		permanent := up.Class == tenant.UpstreamQuota || up.Class == tenant.UpstreamForbidden || up.Class == tenant.UpstreamRefused
		if first && !permanent {
			return nil
		}
		problem := problemOf(up, t.ControlProblem)
		return &problem
	}
	// A failure is probably the reason for the pause: it says more.
	if _, ok := errors.AsType[*deferred](failed); ok && !first && t.ControlProblem == nil {
		return &tenant.Problem{Code: "upstream_paused", Detail: "no call to Clarifai is allowed now; `tenantry upstream` says why", Since: time.Now().UTC()}
	}
	return nil
}

const controlDescription = "Tenantry's control record. Do not delete: it tells a restored database from a copy."

// LeaveControl removes the registration of this replica. The last replica writes into the control
// record that it has stopped, so that the next start of the database need not be watched.
func (s *Service) LeaveControl(ctx context.Context) error {
	// A process that ends has less time than an attempt. With a deadline, callControl would keep all that
	// time for the call, and not wait for a permit.
	leaving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	ctx = leaving
	last, err := s.Store.Leave(ctx)
	if err != nil || !last {
		return err
	}
	recovery, err := s.Store.Recovery(ctx)
	if err != nil || recovery.State == tenant.Watching || recovery.State == tenant.Stopped || recovery.ControlSeenAt.IsZero() {
		return err
	}
	t, err := s.Store.LeaseControl(ctx, true)
	if errors.Is(err, tenant.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	record, exists, err := s.readControl(ctx)
	if err != nil {
		return err
	}
	if _, write, err := s.Store.ExamineControl(ctx, t, record); err != nil || !write {
		return err
	}
	return s.writeControl(ctx, t, exists, "true")
}

// askUnknownKey asks Clarifai which app the next leaked key without a row opens. It reports whether
// a key was due.
func (s *Service) askUnknownKey(ctx context.Context) (asked bool, err error) {
	k, err := s.Store.LeaseQuarantine(ctx, s.Lease)
	if errors.Is(err, tenant.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	asking, cancel := context.WithTimeout(tenant.WithUpstreamTrace(ctx), s.WorkTimeout)
	err = s.identifyKey(asking, k)
	cancel()
	if err == nil || errors.Is(err, tenant.ErrLeaseLost) {
		return true, nil
	}
	set := tenant.Setback{Delay: backoff(s.BackoffBase, s.BackoffCap, k.Attempts), Counts: true,
		Problem: tenant.Problem{Code: "internal", Detail: "Tenantry or its database failed; the log of its replicas says how", Since: time.Now().UTC()}}
	d, isDeferred := errors.AsType[*deferred](err)
	stands, isStanding := errors.AsType[*standing](err)
	up := asUpstream(err)
	switch {
	case isDeferred:
		set, err = tenant.Setback{Delay: d.bounded()}, nil
	case ctx.Err() != nil: // this replica stops, and nothing is wrong with the key
		set = tenant.Setback{}
	case isStanding:
		set.Problem, set.Delay = stands.problem, backoff(4*s.BackoffBase, 4*s.BackoffCap, k.Attempts)
	case up != nil:
		set = s.setback(up, k.Attempts, k.Problem)
	}
	if k.Problem != nil && k.Problem.Code == set.Problem.Code {
		set.Problem.Since = k.Problem.Since
	}
	recording, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	return true, errors.Join(err, s.Store.QuarantineSetback(recording, k, set))
}

// keyAppUnknown is the code of the problem of a leaked key that works and may not name its app.
const keyAppUnknown = "key_app_unknown"

// identifyKey ends the quarantine of a key, or reports why it cannot. A key of an app of ours is revoked.
func (s *Service) identifyKey(ctx context.Context, k tenant.UnknownKey) error {
	// A decision or an adoption may have given the key a row since it was reported.
	switch _, err := s.Store.Quarantine(ctx, k.Fingerprint, newRowID(), k.RequestedBy); {
	case err == nil:
		return s.Store.EndQuarantine(ctx, k, tenant.AdoptedKey{}, "", nil)
	case errors.Is(err, tenant.ErrAnotherDatabase): // this one makes no calls for keys
		return &deferred{wait: maxDefer}
	case !errors.Is(err, tenant.NotFound):
		return err
	}
	secret, err := s.Keyring.Open(k.ID, k.Ciphertext)
	if err != nil {
		return err
	}
	refused := func(code, detail string) error {
		return s.Store.EndQuarantine(ctx, k, tenant.AdoptedKey{}, "", &tenant.Problem{Code: code, Detail: detail, Since: time.Now().UTC()})
	}
	opened, err := s.opens(ctx, incident, secret)
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound:
		return refused("key_dead", "Clarifai does not accept the key: it is dead, or never was a key")
	case tenant.ClassOf(err) == tenant.UpstreamForbidden:
		err := s.call(ctx, incident, func(ctx context.Context) error { return s.Upstream.KeyExists(ctx, secret) })
		switch {
		case tenant.ClassOf(err) == tenant.UpstreamNotFound:
			return refused("key_not_ours", "Clarifai does not say what the key opens, and the key is not among the operator's")
		case err != nil:
			return err
		}
		return &standing{tenant.Problem{Code: keyAppUnknown, Since: time.Now().UTC(),
			Detail: "the key works and is the operator's, but its scopes do not let it name its app: revoke it in Clarifai"}}
	case err != nil:
		return err
	case opened.AppID == "":
		return refused("key_not_ours", "the key works, but does not name a single app, as Tenantry's keys do; revoke it in Clarifai")
	}
	found, err := s.foundKeys(ctx, incident, opened.AppID)
	if err != nil && tenant.ClassOf(err) != tenant.UpstreamNotFound {
		return err
	}
	sealed, err := s.sealed(k.ID, secret)
	if err != nil {
		return err
	}
	key := tenant.AdoptedKey{SealedKey: sealed, Scopes: append([]string{}, opened.Scopes...)}
	for _, f := range found { // its own row id, if the listing shows it
		if f.Ciphertext != nil && bytes.Equal(f.Fingerprint, sealed.Fingerprint) {
			key = f
		}
	}
	if _, err := s.Store.Identify(ctx, tenant.Suspect{AppID: opened.AppID}, k.RequestedBy); err != nil {
		if errors.Is(err, tenant.NotFound) {
			return refused("key_not_ours", "the key opens an app that is not Tenantry's")
		}
		return err
	}
	return s.Store.EndQuarantine(ctx, k, key, opened.AppID, nil)
}

// foundKeys lists the keys of an app that have our ownership tag, newest first. A key whose
// secret the listing hides has no ciphertext.
func (s *Service) foundKeys(ctx context.Context, p tenant.Priority, app tenant.AppID) ([]tenant.AdoptedKey, error) {
	var found []tenant.AdoptedKey
	err := s.eachKey(ctx, p, app, func(k tenant.UpstreamKey) error {
		id := s.keyIDOf(k)
		if id == uuid.Nil {
			return nil
		}
		a := tenant.AdoptedKey{SealedKey: tenant.SealedKey{ID: id}, Scopes: append([]string{}, k.Scopes...)}
		if k.Secret.IsSet() {
			var err error
			if a.SealedKey, err = s.sealed(id, k.Secret); err != nil {
				return err
			}
		}
		found = append(found, a)
		return nil
	})
	slices.SortFunc(found, func(a, b tenant.AdoptedKey) int { return bytes.Compare(b.ID[:], a.ID[:]) }) // ids sort by time
	return found, err
}

// Decide records a decision about one finding by its number or, with number 0, about all findings of
// a kind that wait for a decision. A choice that can do harm is allowed for one finding at a time, and
// confirm must be the id of its tenant, or of its app if the finding names no tenant. Workers carry
// the decision out. Decide returns the number of decided findings.
func (s *Service) Decide(ctx context.Context, number int64, kind tenant.FindingKind, choice tenant.RepairAction, confirm string, actor tenant.Actor) (int, error) {
	var f tenant.Finding
	if number > 0 {
		var err error
		if f, err = s.Store.Finding(ctx, number); err != nil {
			return 0, err
		}
		kind = f.Kind
	}
	choices := kind.Choices()
	i := slices.IndexFunc(choices, func(c tenant.Choice) bool { return c.Name == choice })
	if i < 0 {
		names := make([]string, len(choices))
		for i, c := range choices {
			names[i] = string(c.Name)
		}
		return 0, &tenant.Error{Kind: tenant.Invalid, Code: "invalid_choice", Field: "choice",
			Detail: fmt.Sprintf("is not allowed for a finding of the kind %.40q; allowed: %s", kind, cmp.Or(strings.Join(names, ", "), "nothing"))}
	}
	if choices[i].Typed {
		if number == 0 {
			return 0, &tenant.Error{Kind: tenant.Invalid, Code: "invalid_finding", Field: "finding",
				Detail: fmt.Sprintf("is missing: %q can do harm, and is allowed for one finding at a time", choice)}
		}
		if want := cmp.Or(string(f.TenantID), string(f.AppID)); confirm != want {
			return 0, &tenant.Error{Kind: tenant.Invalid, Code: "invalid_confirm", Field: "confirm",
				Detail: "must be the id of the finding's tenant, or of its app if the finding names no tenant: this choice can do harm"}
		}
	}
	n, err := s.Store.Decide(ctx, number, kind, choice, actor)
	if err == nil && n == 0 && number > 0 {
		return 0, tenant.Errorf(tenant.Conflict, "finding_decided", "the finding does not wait for a decision any more, or a newer report has replaced it")
	}
	return n, err
}

// EndRecovery ends recovery mode. Until a report of this recovery is done and all its findings are
// decided, confirm must be the deployment's id: removals, campaigns and new keys continue at once.
func (s *Service) EndRecovery(ctx context.Context, confirm string, actor tenant.Actor) (tenant.Recovery, error) {
	is, err := s.Store.RecoveryStatus(ctx)
	if err != nil {
		return is, err
	}
	if is.State == tenant.Recovering && confirm != s.Deployment.ID && (!is.ReportDone || is.Undecided > 0) {
		why := fmt.Sprintf("number of findings that wait for a decision: %d", is.Undecided)
		if !is.ReportDone {
			why = "no report is done since recovery mode began, so it is not known what was lost"
		}
		return is, &tenant.Error{Kind: tenant.Invalid, Code: "invalid_confirm", Field: "confirm",
			Detail: fmt.Sprintf("must be the id of the deployment, %s: %s", s.Deployment.ID, why)}
	}
	return s.Store.EndRecovery(ctx, actor)
}

// TakeOver makes this database the one in use. Confirm must be the deployment's id.
func (s *Service) TakeOver(ctx context.Context, confirm string, actor tenant.Actor) (tenant.Recovery, error) {
	if confirm != s.Deployment.ID {
		return tenant.Recovery{}, &tenant.Error{Kind: tenant.Invalid, Code: "invalid_confirm", Field: "confirm",
			Detail: "must be the id of the deployment: check first that the other database is not in use"}
	}
	is, err := s.Store.TakeOver(ctx, actor)
	s.wakeControl()
	return is, err
}

// RemoveRetired removes retired apps: one by its id, which confirm repeats, or all that were begun
// before a time, with their number in confirm. Of the latter, apps that turn out to be in use are not
// removed.
func (s *Service) RemoveRetired(ctx context.Context, f tenant.RetiredFilter, confirm string, actor tenant.Actor) error {
	count := 1
	if f.AppID != "" && confirm != string(f.AppID) {
		return &tenant.Error{Kind: tenant.Invalid, Code: "invalid_confirm", Field: "confirm", Detail: "must be the id of the app: its data is removed for good"}
	}
	if f.AppID == "" {
		var err error
		if count, err = strconv.Atoi(confirm); err != nil {
			return &tenant.Error{Kind: tenant.Invalid, Code: "invalid_confirm", Field: "confirm", Detail: "must be the number of apps that are to be removed"}
		}
	}
	return s.Store.RemoveRetired(ctx, f, count, actor)
}
