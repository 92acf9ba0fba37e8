package provision_test

import (
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A watchedStore is a Store that tells of each call once it has returned.
// TestEveryCallIsWatched finds the methods that are missing.
type watchedStore struct {
	provision.Store
	returned func()
}

// A watchedUpstream is an Upstream that tells of each call once it has returned.
type watchedUpstream struct {
	provision.Upstream
	returned func()
}

func (s watchedStore) Deployment(ctx context.Context) (tenant.Deployment, error) {
	defer s.returned()
	return s.Store.Deployment(ctx)
}

func (s watchedStore) PinDeployment(ctx context.Context, d tenant.Deployment) (tenant.Deployment, error) {
	defer s.returned()
	return s.Store.PinDeployment(ctx, d)
}

func (s watchedStore) SignUp(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (tenant.SignedUp, error) {
	defer s.returned()
	return s.Store.SignUp(ctx, n, actor)
}

func (s watchedStore) SignUpMany(ctx context.Context, n tenant.NewBatch, actor tenant.Actor) ([]tenant.SignedUp, error) {
	defer s.returned()
	return s.Store.SignUpMany(ctx, n, actor)
}

func (s watchedStore) ClaimInBackground(ctx context.Context, p tenant.Profile, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.ClaimInBackground(ctx, p, actor)
}

func (s watchedStore) Tenant(ctx context.Context, id tenant.ID) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Tenant(ctx, id)
}

func (s watchedStore) Retry(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Retry(ctx, id, actor)
}

func (s watchedStore) Watch(id tenant.ID) (changed <-chan struct{}, stop func()) {
	defer s.returned()
	return s.Store.Watch(id)
}

func (s watchedStore) Reveal(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, []byte, error) {
	defer s.returned()
	return s.Store.Reveal(ctx, id, name, actor)
}

func (s watchedStore) Identify(ctx context.Context, what tenant.Suspect, actor tenant.Actor) (tenant.Identified, error) {
	defer s.returned()
	return s.Store.Identify(ctx, what, actor)
}

func (s watchedStore) LeaseApps(ctx context.Context, ids []tenant.AppID, lease time.Duration) ([]tenant.App, error) {
	defer s.returned()
	return s.Store.LeaseApps(ctx, ids, lease)
}

func (s watchedStore) BeginApp(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.BeginApp(ctx, a)
}

func (s watchedStore) AppMade(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.AppMade(ctx, a)
}

func (s watchedStore) BeginKey(ctx context.Context, a tenant.App, key tenant.NewKeyRow) (uuid.UUID, error) {
	defer s.returned()
	return s.Store.BeginKey(ctx, a, key)
}

func (s watchedStore) GiveUpKey(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.GiveUpKey(ctx, a)
}

func (s watchedStore) FinishBuild(ctx context.Context, a tenant.App, end tenant.BuildEnd, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.FinishBuild(ctx, a, end, actor)
}

func (s watchedStore) AbandonApp(ctx context.Context, a tenant.App, ours bool, reason string, next tenant.NextBuilds, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.AbandonApp(ctx, a, ours, reason, next, actor)
}

func (s watchedStore) AppDeleted(ctx context.Context, a tenant.App, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.AppDeleted(ctx, a, actor)
}

func (s watchedStore) BeginTag(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.BeginTag(ctx, a)
}

func (s watchedStore) AppMarked(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.AppMarked(ctx, a)
}

func (s watchedStore) LeaseKeys(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedKey, error) {
	defer s.returned()
	return s.Store.LeaseKeys(ctx, ids, lease)
}

func (s watchedStore) KeyEnded(ctx context.Context, k tenant.LeasedKey, lost *tenant.Problem, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.KeyEnded(ctx, k, lost, actor)
}

func (s watchedStore) KeyEndUnconfirmed(ctx context.Context, k tenant.LeasedKey, delay time.Duration) error {
	defer s.returned()
	return s.Store.KeyEndUnconfirmed(ctx, k, delay)
}

func (s watchedStore) RetireApp(ctx context.Context, a tenant.App, reason string, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.RetireApp(ctx, a, reason, actor)
}

func (s watchedStore) UnknownKeys(ctx context.Context, app tenant.AppID, found []uuid.UUID) ([]uuid.UUID, error) {
	defer s.returned()
	return s.Store.UnknownKeys(ctx, app, found)
}

func (s watchedStore) KeyNotReplaced(ctx context.Context, k tenant.LeasedKey, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.KeyNotReplaced(ctx, k, actor)
}

func (s watchedStore) Beat(ctx context.Context, pat []byte) (tenant.Beat, error) {
	defer s.returned()
	return s.Store.Beat(ctx, pat)
}

func (s watchedStore) RetireApps(ctx context.Context) (int, error) {
	defer s.returned()
	return s.Store.RetireApps(ctx)
}

func (s watchedStore) Recovery(ctx context.Context) (tenant.Recovery, error) {
	defer s.returned()
	return s.Store.Recovery(ctx)
}

func (s watchedStore) RecoveryStatus(ctx context.Context) (tenant.Recovery, error) {
	defer s.returned()
	return s.Store.RecoveryStatus(ctx)
}

func (s watchedStore) EndRecovery(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error) {
	defer s.returned()
	return s.Store.EndRecovery(ctx, actor)
}

func (s watchedStore) TakeOver(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error) {
	defer s.returned()
	return s.Store.TakeOver(ctx, actor)
}

func (s watchedStore) RemoveRetired(ctx context.Context, f tenant.RetiredFilter, count int, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.RemoveRetired(ctx, f, count, actor)
}

func (s watchedStore) LeaseControl(ctx context.Context, force bool) (tenant.ControlTurn, error) {
	defer s.returned()
	return s.Store.LeaseControl(ctx, force)
}

func (s watchedStore) ExamineControl(ctx context.Context, t tenant.ControlTurn, record *tenant.ControlRecord) (is tenant.Recovery, write bool, err error) {
	defer s.returned()
	return s.Store.ExamineControl(ctx, t, record)
}

func (s watchedStore) DeferControl(ctx context.Context, t tenant.ControlTurn, delay time.Duration) error {
	defer s.returned()
	return s.Store.DeferControl(ctx, t, delay)
}

func (s watchedStore) ControlWritten(ctx context.Context, t tenant.ControlTurn, problem *tenant.Problem) error {
	defer s.returned()
	return s.Store.ControlWritten(ctx, t, problem)
}

func (s watchedStore) Leave(ctx context.Context) (last bool, err error) {
	defer s.returned()
	return s.Store.Leave(ctx)
}

func (s watchedStore) BeginQuarantine(ctx context.Context, key tenant.SealedKey, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.BeginQuarantine(ctx, key, actor)
}

func (s watchedStore) QuarantineState(ctx context.Context, fingerprint []byte) (tenant.UnknownKey, error) {
	defer s.returned()
	return s.Store.QuarantineState(ctx, fingerprint)
}

func (s watchedStore) LeaseQuarantine(ctx context.Context, lease time.Duration) (tenant.UnknownKey, error) {
	defer s.returned()
	return s.Store.LeaseQuarantine(ctx, lease)
}

func (s watchedStore) EndQuarantine(ctx context.Context, k tenant.UnknownKey, found tenant.AdoptedKey, app tenant.AppID, problem *tenant.Problem) error {
	defer s.returned()
	return s.Store.EndQuarantine(ctx, k, found, app, problem)
}

func (s watchedStore) QuarantineSetback(ctx context.Context, k tenant.UnknownKey, set tenant.Setback) error {
	defer s.returned()
	return s.Store.QuarantineSetback(ctx, k, set)
}

func (s watchedStore) Finding(ctx context.Context, number int64) (tenant.Finding, error) {
	defer s.returned()
	return s.Store.Finding(ctx, number)
}

func (s watchedStore) Decide(ctx context.Context, number int64, kind tenant.FindingKind, choice tenant.RepairAction, actor tenant.Actor) (int, error) {
	defer s.returned()
	return s.Store.Decide(ctx, number, kind, choice, actor)
}

func (s watchedStore) StartDueDecisions(ctx context.Context, id uuid.UUID) (bool, error) {
	defer s.returned()
	return s.Store.StartDueDecisions(ctx, id)
}

func (s watchedStore) AdoptFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey, dead []uuid.UUID) error {
	defer s.returned()
	return s.Store.AdoptFoundKey(ctx, r, f, k, dead)
}

func (s watchedStore) EndFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey) error {
	defer s.returned()
	return s.Store.EndFoundKey(ctx, r, f, k)
}

func (s watchedStore) KeysListed(ctx context.Context, a tenant.App, found []tenant.AdoptedKey, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.KeysListed(ctx, a, found, actor)
}

func (s watchedStore) KeysOfApp(ctx context.Context, app tenant.AppID) ([]tenant.SealedKey, error) {
	defer s.returned()
	return s.Store.KeysOfApp(ctx, app)
}

func (s watchedStore) SuspendDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.SuspendDecided(ctx, r, f)
}

func (s watchedStore) RestoreDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.RestoreDecided(ctx, r, f)
}

func (s watchedStore) RemovalDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.RemovalDecided(ctx, r, f)
}

func (s watchedStore) OwnerDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.OwnerDecided(ctx, r, f)
}

func (s watchedStore) Contested(ctx context.Context, a tenant.App, f tenant.Finding, problem tenant.Problem, retry tenant.Setback) error {
	defer s.returned()
	return s.Store.Contested(ctx, a, f, problem, retry)
}

func (s watchedStore) SmallerPages(ctx context.Context, r tenant.Reconciliation) (bool, error) {
	defer s.returned()
	return s.Store.SmallerPages(ctx, r)
}

func (s watchedStore) PurgeWait(ctx context.Context, perHour int) (time.Duration, error) {
	defer s.returned()
	return s.Store.PurgeWait(ctx, perHour)
}

func (s watchedStore) BeginPurge(ctx context.Context, a tenant.App, perHour int, actor tenant.Actor) (wait time.Duration, err error) {
	defer s.returned()
	return s.Store.BeginPurge(ctx, a, perHour, actor)
}

func (s watchedStore) StartReport(ctx context.Context, id uuid.UUID, actor tenant.Actor) (tenant.Reconciliation, error) {
	defer s.returned()
	return s.Store.StartReport(ctx, id, actor)
}

func (s watchedStore) StartRepair(ctx context.Context, id uuid.UUID, token string, actor tenant.Actor) (tenant.Reconciliation, error) {
	defer s.returned()
	return s.Store.StartRepair(ctx, id, token, actor)
}

func (s watchedStore) StartDueReport(ctx context.Context, id uuid.UUID, every time.Duration, actor tenant.Actor) (bool, error) {
	defer s.returned()
	return s.Store.StartDueReport(ctx, id, every, actor)
}

func (s watchedStore) Reconciliation(ctx context.Context, id uuid.UUID) (tenant.Reconciliation, error) {
	defer s.returned()
	return s.Store.Reconciliation(ctx, id)
}

func (s watchedStore) LeaseReconciliations(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Reconciliation, error) {
	defer s.returned()
	return s.Store.LeaseReconciliations(ctx, ids, lease)
}

func (s watchedStore) EndReconciliation(ctx context.Context, r tenant.Reconciliation) (was, is tenant.Recovery, err error) {
	defer s.returned()
	return s.Store.EndReconciliation(ctx, r)
}

func (s watchedStore) SawApps(ctx context.Context, r tenant.Reconciliation, apps []tenant.ListedApp, last bool) error {
	defer s.returned()
	return s.Store.SawApps(ctx, r, apps, last)
}

func (s watchedStore) SawKeys(ctx context.Context, r tenant.Reconciliation, keys []tenant.ListedKey) error {
	defer s.returned()
	return s.Store.SawKeys(ctx, r, keys)
}

func (s watchedStore) Compare(ctx context.Context, r tenant.Reconciliation) error {
	defer s.returned()
	return s.Store.Compare(ctx, r)
}

func (s watchedStore) TurnTo(ctx context.Context, r tenant.Reconciliation, phase tenant.ReconciliationPhase) error {
	defer s.returned()
	return s.Store.TurnTo(ctx, r, phase)
}

func (s watchedStore) NextFinding(ctx context.Context, r tenant.Reconciliation, state tenant.FindingState) (tenant.Finding, error) {
	defer s.returned()
	return s.Store.NextFinding(ctx, r, state)
}

func (s watchedStore) ConfirmFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.ConfirmFinding(ctx, r, f)
}

func (s watchedStore) DropFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.DropFinding(ctx, r, f)
}

func (s watchedStore) EndFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, state tenant.FindingState, note string) error {
	defer s.returned()
	return s.Store.EndFinding(ctx, r, f, state, note)
}

func (s watchedStore) CountFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, map[tenant.FindingState]int, error) {
	defer s.returned()
	return s.Store.CountFindings(ctx, r)
}

func (s watchedStore) CountOpenFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, error) {
	defer s.returned()
	return s.Store.CountOpenFindings(ctx, r)
}

func (s watchedStore) LastReport(ctx context.Context) (tenant.Reconciliation, error) {
	defer s.returned()
	return s.Store.LastReport(ctx)
}

func (s watchedStore) KeyOf(ctx context.Context, f tenant.Finding) (tenant.SealedKey, []string, error) {
	defer s.returned()
	return s.Store.KeyOf(ctx, f)
}

func (s watchedStore) AdoptApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error {
	defer s.returned()
	return s.Store.AdoptApp(ctx, r, f, a)
}

func (s watchedStore) RemoveApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.RemoveApp(ctx, r, f)
}

func (s watchedStore) RevokeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.SealedKey) error {
	defer s.returned()
	return s.Store.RevokeKey(ctx, r, f, key)
}

func (s watchedStore) ForgetApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.ForgetApp(ctx, r, f)
}

func (s watchedStore) DiscardApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.DiscardApp(ctx, r, f)
}

func (s watchedStore) RemakeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.NewKeyRow) error {
	defer s.returned()
	return s.Store.RemakeKey(ctx, r, f, key)
}

func (s watchedStore) KeyRescoped(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.KeyRescoped(ctx, r, f)
}

func (s watchedStore) MarkAgain(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	defer s.returned()
	return s.Store.MarkAgain(ctx, r, f)
}

func (s watchedStore) RemovalsInLastHour(ctx context.Context) (n int, until time.Duration, err error) {
	defer s.returned()
	return s.Store.RemovalsInLastHour(ctx)
}

func (s watchedStore) SetFirstAttributes(ctx context.Context, id tenant.ID, a tenant.Attributes, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.SetFirstAttributes(ctx, id, a, actor)
}

func (s watchedStore) ReserveSlot(ctx context.Context, r tenant.SlotRequest) (tenant.Slot, error) {
	defer s.returned()
	return s.Store.ReserveSlot(ctx, r)
}

func (s watchedStore) SlotHolds(ctx context.Context, epoch int64) (bool, error) {
	defer s.returned()
	return s.Store.SlotHolds(ctx, epoch)
}

func (s watchedStore) UpstreamFailed(ctx context.Context, f tenant.UpstreamFailure) (pause time.Duration, err error) {
	defer s.returned()
	return s.Store.UpstreamFailed(ctx, f)
}

func (s watchedStore) UpstreamWorks(ctx context.Context, epoch int64) (resumed bool, err error) {
	defer s.returned()
	return s.Store.UpstreamWorks(ctx, epoch)
}

func (s watchedStore) Interrupt(ctx context.Context, epoch int64, perSecond float64, probeTimeout time.Duration, reason tenant.Problem) (tenant.Slot, error) {
	defer s.returned()
	return s.Store.Interrupt(ctx, epoch, perSecond, probeTimeout, reason)
}

func (s watchedStore) BeginPATCheck(ctx context.Context, fingerprint []byte, trust, limit time.Duration) (works, check bool, err error) {
	defer s.returned()
	return s.Store.BeginPATCheck(ctx, fingerprint, trust, limit)
}

func (s watchedStore) RefusePAT(ctx context.Context, fingerprint []byte, problem tenant.Problem, base, most time.Duration) (news bool, err error) {
	defer s.returned()
	return s.Store.RefusePAT(ctx, fingerprint, problem, base, most)
}

func (s watchedStore) PATWorks(ctx context.Context, fingerprint []byte) (news bool, err error) {
	defer s.returned()
	return s.Store.PATWorks(ctx, fingerprint)
}

func (s watchedStore) ClaimPATCheck(ctx context.Context, fingerprint []byte, in time.Duration) (free bool, wait time.Duration, err error) {
	defer s.returned()
	return s.Store.ClaimPATCheck(ctx, fingerprint, in)
}

func (s watchedStore) Upstream(ctx context.Context, pat []byte) (tenant.UpstreamStatus, error) {
	defer s.returned()
	return s.Store.Upstream(ctx, pat)
}

func (s watchedStore) Claim(ctx context.Context, profile string, actor tenant.Actor) (int, error) {
	defer s.returned()
	return s.Store.Claim(ctx, profile, actor)
}

func (s watchedStore) StartBuilds(ctx context.Context, n tenant.NextBuilds) error {
	defer s.returned()
	return s.Store.StartBuilds(ctx, n)
}

func (s watchedStore) MakeAuditPartitions(ctx context.Context) error {
	defer s.returned()
	return s.Store.MakeAuditPartitions(ctx)
}

func (s watchedStore) SealAudit(ctx context.Context, patience time.Duration) (tenant.Sealing, error) {
	defer s.returned()
	return s.Store.SealAudit(ctx, patience)
}

func (u watchedUpstream) Whoami(ctx context.Context, pat tenant.Secret) (tenant.UserID, error) {
	defer u.returned()
	return u.Upstream.Whoami(ctx, pat)
}

func (u watchedUpstream) CreateApp(ctx context.Context, app tenant.NewApp) error {
	defer u.returned()
	return u.Upstream.CreateApp(ctx, app)
}

func (u watchedUpstream) CreateApps(ctx context.Context, apps []tenant.NewApp) error {
	defer u.returned()
	return u.Upstream.CreateApps(ctx, apps)
}

func (u watchedUpstream) CreateKeys(ctx context.Context, keys []tenant.NewKey) ([]tenant.Secret, error) {
	defer u.returned()
	return u.Upstream.CreateKeys(ctx, keys)
}

func (u watchedUpstream) App(ctx context.Context, id tenant.AppID) (tenant.UpstreamApp, error) {
	defer u.returned()
	return u.Upstream.App(ctx, id)
}

func (u watchedUpstream) Apps(ctx context.Context, page tenant.Page) ([]tenant.UpstreamApp, error) {
	defer u.returned()
	return u.Upstream.Apps(ctx, page)
}

func (u watchedUpstream) MarkApp(ctx context.Context, id tenant.AppID, marker tenant.Marker, description string) error {
	defer u.returned()
	return u.Upstream.MarkApp(ctx, id, marker, description)
}

func (u watchedUpstream) DeleteApp(ctx context.Context, id tenant.AppID) error {
	defer u.returned()
	return u.Upstream.DeleteApp(ctx, id)
}

func (u watchedUpstream) CreateKey(ctx context.Context, key tenant.NewKey) (tenant.Secret, error) {
	defer u.returned()
	return u.Upstream.CreateKey(ctx, key)
}

func (u watchedUpstream) AppKeys(ctx context.Context, id tenant.AppID, page int) ([]tenant.UpstreamKey, error) {
	defer u.returned()
	return u.Upstream.AppKeys(ctx, id, page)
}

func (u watchedUpstream) Keys(ctx context.Context, page tenant.Page) ([]tenant.UpstreamKey, error) {
	defer u.returned()
	return u.Upstream.Keys(ctx, page)
}

func (u watchedUpstream) KeyExists(ctx context.Context, key tenant.Secret) error {
	defer u.returned()
	return u.Upstream.KeyExists(ctx, key)
}

func (u watchedUpstream) SetKeyScopes(ctx context.Context, key tenant.Secret, scopes []string) error {
	defer u.returned()
	return u.Upstream.SetKeyScopes(ctx, key, scopes)
}

func (u watchedUpstream) DeleteKey(ctx context.Context, key tenant.Secret) error {
	defer u.returned()
	return u.Upstream.DeleteKey(ctx, key)
}

func (s watchedStore) RevealKey(ctx context.Context, id tenant.ID, key uuid.UUID, actor tenant.Actor) (tenant.Key, []byte, error) {
	defer s.returned()
	return s.Store.RevealKey(ctx, id, key, actor)
}

func (s watchedStore) Suspend(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Suspend(ctx, id, actor)
}

func (s watchedStore) Resume(ctx context.Context, id tenant.ID, keys []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Resume(ctx, id, keys, actor)
}

func (s watchedStore) Delete(ctx context.Context, id tenant.ID, purgeNow bool, retention func(string) time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Delete(ctx, id, purgeNow, retention, actor)
}

func (s watchedStore) Restore(ctx context.Context, id tenant.ID, keys []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.Restore(ctx, id, keys, actor)
}

func (s watchedStore) UpdateTenant(ctx context.Context, id tenant.ID, p tenant.Patch, current func(tenant.Tenant) bool, actor tenant.Actor) (tenant.Tenant, error) {
	defer s.returned()
	return s.Store.UpdateTenant(ctx, id, p, current, actor)
}

func (s watchedStore) Keys(ctx context.Context, id tenant.ID) ([]tenant.Key, error) {
	defer s.returned()
	return s.Store.Keys(ctx, id)
}

func (s watchedStore) Key(ctx context.Context, id tenant.ID, name string) (tenant.Key, error) {
	defer s.returned()
	return s.Store.Key(ctx, id, name)
}

func (s watchedStore) AddKey(ctx context.Context, id tenant.ID, spec tenant.KeySpec, newRow func(tenant.Tenant) (tenant.NewKeyRow, error), actor tenant.Actor) (key tenant.Key, created bool, err error) {
	defer s.returned()
	return s.Store.AddKey(ctx, id, spec, newRow, actor)
}

func (s watchedStore) RevokeKeyNamed(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, error) {
	defer s.returned()
	return s.Store.RevokeKeyNamed(ctx, id, name, actor)
}

func (s watchedStore) StartRotation(ctx context.Context, id tenant.ID, n tenant.NewRotation, actor tenant.Actor) (tenant.Rotation, error) {
	defer s.returned()
	return s.Store.StartRotation(ctx, id, n, actor)
}

func (s watchedStore) Rotation(ctx context.Context, id tenant.ID, name, rotation string) (tenant.Rotation, error) {
	defer s.returned()
	return s.Store.Rotation(ctx, id, name, rotation)
}

func (s watchedStore) ConfirmRotation(ctx context.Context, id tenant.ID, name, rotation string, actor tenant.Actor) (tenant.Rotation, error) {
	defer s.returned()
	return s.Store.ConfirmRotation(ctx, id, name, rotation, actor)
}

func (s watchedStore) Quarantine(ctx context.Context, fingerprint []byte, next uuid.UUID, actor tenant.Actor) (tenant.Quarantine, error) {
	defer s.returned()
	return s.Store.Quarantine(ctx, fingerprint, next, actor)
}

func (s watchedStore) AddExtraKeys(ctx context.Context, a tenant.App, keys []tenant.NewKeyRow, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.AddExtraKeys(ctx, a, keys, actor)
}

func (s watchedStore) BeginLeasedKey(ctx context.Context, k tenant.LeasedKey) error {
	defer s.returned()
	return s.Store.BeginLeasedKey(ctx, k)
}

func (s watchedStore) ReplaceLeasedKey(ctx context.Context, k tenant.LeasedKey, id uuid.UUID) (tenant.LeasedKey, error) {
	defer s.returned()
	return s.Store.ReplaceLeasedKey(ctx, k, id)
}

func (s watchedStore) FinishLeasedKey(ctx context.Context, k tenant.LeasedKey, key tenant.SealedKey, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.FinishLeasedKey(ctx, k, key, actor)
}

func (s watchedStore) EndDueKeys(ctx context.Context, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.EndDueKeys(ctx, actor)
}

func (s watchedStore) SettleTenants(ctx context.Context, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.SettleTenants(ctx, actor)
}

func (s watchedStore) Sealed(ctx context.Context) (tenant.Sealed, error) {
	defer s.returned()
	return s.Store.Sealed(ctx)
}

func (s watchedStore) CountSealed(ctx context.Context) (tenant.SealedCounts, error) {
	defer s.returned()
	return s.Store.CountSealed(ctx)
}

func (s watchedStore) Reseal(ctx context.Context, by tenant.SealKeyID, after uuid.UUID, most int, seal func(id uuid.UUID, ciphertext []byte) []byte) (tenant.Resealed, error) {
	defer s.returned()
	return s.Store.Reseal(ctx, by, after, most, seal)
}

func (s watchedStore) ResealProbe(ctx context.Context, old, sealed []byte, actor tenant.Actor) (bool, error) {
	defer s.returned()
	return s.Store.ResealProbe(ctx, old, sealed, actor)
}

func (s watchedStore) MarkAnew(ctx context.Context, by []tenant.SealKeyID, most int) (int, error) {
	defer s.returned()
	return s.Store.MarkAnew(ctx, by, most)
}

func (s watchedStore) TenantCounts(ctx context.Context) ([]tenant.TenantCount, error) {
	defer s.returned()
	return s.Store.TenantCounts(ctx)
}

func (s watchedStore) FoldTenantCounts(ctx context.Context) error {
	defer s.returned()
	return s.Store.FoldTenantCounts(ctx)
}

func (s watchedStore) BeginAdoption(ctx context.Context, n tenant.NewAdoption, agrees func(t tenant.Tenant, first []byte) error, actor tenant.Actor) (tenant.BegunAdoption, error) {
	defer s.returned()
	return s.Store.BeginAdoption(ctx, n, agrees, actor)
}

func (s watchedStore) HasAdoption(ctx context.Context, id tenant.ID, dryRun bool) (bool, error) {
	defer s.returned()
	return s.Store.HasAdoption(ctx, id, dryRun)
}

func (s watchedStore) Adoption(ctx context.Context, id uuid.UUID) (tenant.Adoption, error) {
	defer s.returned()
	return s.Store.Adoption(ctx, id)
}

func (s watchedStore) LeaseAdoptions(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedAdoption, error) {
	defer s.returned()
	return s.Store.LeaseAdoptions(ctx, ids, lease)
}

func (s watchedStore) ReserveAdoption(ctx context.Context, a tenant.LeasedAdoption) (bool, error) {
	defer s.returned()
	return s.Store.ReserveAdoption(ctx, a)
}

func (s watchedStore) HoldAdopted(ctx context.Context, a tenant.LeasedAdoption, key tenant.SealedKey, scopes []string, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.HoldAdopted(ctx, a, key, scopes, actor)
}

func (s watchedStore) EndAdoption(ctx context.Context, a tenant.LeasedAdoption, state tenant.AdoptionState, problem *tenant.Problem, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.EndAdoption(ctx, a, state, problem, actor)
}

func (u watchedUpstream) AppOf(ctx context.Context, owner tenant.UserID, id tenant.AppID) (tenant.UpstreamApp, error) {
	defer u.returned()
	return u.Upstream.AppOf(ctx, owner, id)
}

func (u watchedUpstream) Opens(ctx context.Context, key tenant.Secret) (tenant.OpenedApp, error) {
	defer u.returned()
	return u.Upstream.Opens(ctx, key)
}

func (s watchedStore) NoteProfiles(ctx context.Context, profiles []tenant.Profile) error {
	defer s.returned()
	return s.Store.NoteProfiles(ctx, profiles)
}

func (s watchedStore) StartCampaign(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (tenant.Campaign, error) {
	defer s.returned()
	return s.Store.StartCampaign(ctx, n, actor)
}

func (s watchedStore) StartDueRotation(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (bool, error) {
	defer s.returned()
	return s.Store.StartDueRotation(ctx, n, actor)
}

func (s watchedStore) CountKeys(ctx context.Context, f tenant.KeyFilter) (int, error) {
	defer s.returned()
	return s.Store.CountKeys(ctx, f)
}

func (s watchedStore) ChangeCampaign(ctx context.Context, id uuid.UUID, change tenant.CampaignChange, actor tenant.Actor) (tenant.Campaign, bool, error) {
	defer s.returned()
	return s.Store.ChangeCampaign(ctx, id, change, actor)
}

func (s watchedStore) LeaseCampaigns(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Campaign, error) {
	defer s.returned()
	return s.Store.LeaseCampaigns(ctx, ids, lease)
}

func (s watchedStore) SettleCampaign(ctx context.Context, c tenant.Campaign, actor tenant.Actor) (tenant.Settling, error) {
	defer s.returned()
	return s.Store.SettleCampaign(ctx, c, actor)
}

func (s watchedStore) CountCampaign(ctx context.Context, c tenant.Campaign) (tenant.Campaign, error) {
	defer s.returned()
	return s.Store.CountCampaign(ctx, c)
}

func (s watchedStore) RotateSome(ctx context.Context, c tenant.Campaign, ids []uuid.UUID, actor tenant.Actor) (tenant.Campaign, error) {
	defer s.returned()
	return s.Store.RotateSome(ctx, c, ids, actor)
}

func (s watchedStore) Misfits(ctx context.Context, profile, revision string, after tenant.AppID, limit int) ([]tenant.Misfit, error) {
	defer s.returned()
	return s.Store.Misfits(ctx, profile, revision, after, limit)
}

func (s watchedStore) NextMisfit(ctx context.Context, c tenant.Campaign) (tenant.Misfit, error) {
	defer s.returned()
	return s.Store.NextMisfit(ctx, c)
}

func (s watchedStore) KeyRescopedTo(ctx context.Context, c tenant.Campaign, m tenant.Misfit, k tenant.MisfitKey, scopes []string, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.KeyRescopedTo(ctx, c, m, k, scopes, actor)
}

func (s watchedStore) Conformed(ctx context.Context, c tenant.Campaign, m tenant.Misfit, ids []uuid.UUID, actor tenant.Actor) (bool, error) {
	defer s.returned()
	return s.Store.Conformed(ctx, c, m, ids, actor)
}

func (s watchedStore) LeaveMisfit(ctx context.Context, c tenant.Campaign, m tenant.Misfit, state tenant.CampaignItemState, problem tenant.Problem) error {
	defer s.returned()
	return s.Store.LeaveMisfit(ctx, c, m, state, problem)
}

func (s watchedStore) CountCampaigns(ctx context.Context) (map[tenant.CampaignKind]map[tenant.CampaignState]int, error) {
	defer s.returned()
	return s.Store.CountCampaigns(ctx)
}

func (u watchedUpstream) ChangeApp(ctx context.Context, id tenant.AppID, change tenant.AppChange) error {
	defer u.returned()
	return u.Upstream.ChangeApp(ctx, id, change)
}

func (s watchedStore) PlanPools(ctx context.Context, profiles []tenant.Profile, plan tenant.PoolPlan, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.PlanPools(ctx, profiles, plan, actor)
}

func (s watchedStore) DefaultKeyOf(ctx context.Context, app tenant.AppID) (tenant.SealedKey, error) {
	defer s.returned()
	return s.Store.DefaultKeyOf(ctx, app)
}

func (s watchedStore) KeyProven(ctx context.Context, a tenant.App) error {
	defer s.returned()
	return s.Store.KeyProven(ctx, a)
}

func (s watchedStore) MemberDead(ctx context.Context, a tenant.App, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.MemberDead(ctx, a, actor)
}

func (s watchedStore) RemakeHeldKey(ctx context.Context, a tenant.App, gone uuid.UUID, next uuid.UUID, actor tenant.Actor) error {
	defer s.returned()
	return s.Store.RemakeHeldKey(ctx, a, gone, next, actor)
}

func (s watchedStore) Pools(ctx context.Context, names []string) ([]tenant.Pool, tenant.PoolLoad, error) {
	defer s.returned()
	return s.Store.Pools(ctx, names)
}

func (s watchedStore) DueWork(ctx context.Context, kind tenant.WorkKind, slots [tenant.Priorities]int) ([]tenant.DueWork, error) {
	defer s.returned()
	return s.Store.DueWork(ctx, kind, slots)
}

func (s watchedStore) WorkDue(kind tenant.WorkKind) <-chan struct{} {
	defer s.returned()
	return s.Store.WorkDue(kind)
}

func (s watchedStore) Release(ctx context.Context, l tenant.Lease, delay time.Duration) error {
	defer s.returned()
	return s.Store.Release(ctx, l, delay)
}

func (s watchedStore) SetBack(ctx context.Context, l tenant.Lease, set tenant.Setback) error {
	defer s.returned()
	return s.Store.SetBack(ctx, l, set)
}

func (s watchedStore) ForgetAdoptions(ctx context.Context) error {
	defer s.returned()
	return s.Store.ForgetAdoptions(ctx)
}
