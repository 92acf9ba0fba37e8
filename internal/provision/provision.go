// Package provision decides what happens: how a tenant signs up, how an app and
// its key are built, claimed and removed, and what is done when a step fails.
//
// Requests write what shall be and wait; workers, in any replica, make it so.
// Only workers call Clarifai.
package provision

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/oklog/ulid/v2"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A Store keeps the rows. Its methods are atomic: each does all it says, or
// nothing. Those that take a leased row answer tenant.ErrLeaseLost, and change
// nothing, once the lease is gone.
type Store interface {
	Deployment(ctx context.Context) (tenant.Deployment, error)
	PinDeployment(ctx context.Context, d tenant.Deployment) (tenant.Deployment, error)

	SignUp(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (tenant.SignedUp, error)
	SignUpMany(ctx context.Context, n tenant.NewBatch, actor tenant.Actor) ([]tenant.SignedUp, error)
	Tenant(ctx context.Context, id tenant.ID) (tenant.Tenant, error)
	Retry(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error)
	Watch(id tenant.ID) (changed <-chan struct{}, stop func())
	Reveal(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, []byte, error)
	RevealKey(ctx context.Context, id tenant.ID, key uuid.UUID, actor tenant.Actor) (tenant.Key, []byte, error)
	Identify(ctx context.Context, what tenant.Suspect, actor tenant.Actor) (tenant.Identified, error)

	Suspend(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error)
	Resume(ctx context.Context, id tenant.ID, keys []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error)
	Delete(ctx context.Context, id tenant.ID, purgeNow bool, retention func(profile string) time.Duration, actor tenant.Actor) (tenant.Tenant, error)
	Restore(ctx context.Context, id tenant.ID, keys []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error)
	UpdateTenant(ctx context.Context, id tenant.ID, p tenant.Patch, current func(tenant.Tenant) bool, actor tenant.Actor) (tenant.Tenant, error)
	Keys(ctx context.Context, id tenant.ID) ([]tenant.Key, error)
	Key(ctx context.Context, id tenant.ID, name string) (tenant.Key, error)
	AddKey(ctx context.Context, id tenant.ID, spec tenant.KeySpec, row func(tenant.Tenant) (tenant.NewKeyRow, error), actor tenant.Actor) (key tenant.Key, created bool, err error)
	RevokeKeyNamed(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, error)
	StartRotation(ctx context.Context, id tenant.ID, n tenant.NewRotation, actor tenant.Actor) (tenant.Rotation, error)
	Rotation(ctx context.Context, id tenant.ID, name, rotation string) (tenant.Rotation, error)
	ConfirmRotation(ctx context.Context, id tenant.ID, name, rotation string, actor tenant.Actor) (tenant.Rotation, error)
	Quarantine(ctx context.Context, fingerprint []byte, next uuid.UUID, actor tenant.Actor) (tenant.Quarantine, error)

	LeaseApps(ctx context.Context, ids []tenant.AppID, lease time.Duration) ([]tenant.App, error)
	BeginApp(ctx context.Context, a tenant.App) error
	AppMade(ctx context.Context, a tenant.App) error
	BeginKey(ctx context.Context, a tenant.App, key tenant.NewKeyRow) (uuid.UUID, error)
	GiveUpKey(ctx context.Context, a tenant.App) error
	FinishBuild(ctx context.Context, a tenant.App, end tenant.BuildEnd, actor tenant.Actor) error
	AbandonApp(ctx context.Context, a tenant.App, ours bool, reason string, next tenant.NextBuilds, actor tenant.Actor) error
	RetireApp(ctx context.Context, a tenant.App, reason string, actor tenant.Actor) error
	UnknownKeys(ctx context.Context, app tenant.AppID, found []uuid.UUID) ([]uuid.UUID, error)
	AppDeleted(ctx context.Context, a tenant.App, actor tenant.Actor) error

	AddExtraKeys(ctx context.Context, a tenant.App, keys []tenant.NewKeyRow, actor tenant.Actor) error
	BeginTag(ctx context.Context, a tenant.App) error
	AppMarked(ctx context.Context, a tenant.App) error

	LeaseKeys(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedKey, error)
	BeginLeasedKey(ctx context.Context, k tenant.LeasedKey) error
	ReplaceLeasedKey(ctx context.Context, k tenant.LeasedKey, id uuid.UUID) (tenant.LeasedKey, error)
	FinishLeasedKey(ctx context.Context, k tenant.LeasedKey, key tenant.SealedKey, actor tenant.Actor) error
	KeyEnded(ctx context.Context, k tenant.LeasedKey, lost *tenant.Problem, actor tenant.Actor) error
	KeyEndUnconfirmed(ctx context.Context, k tenant.LeasedKey, delay time.Duration) error
	KeyNotReplaced(ctx context.Context, k tenant.LeasedKey, actor tenant.Actor) error

	BeginAdoption(ctx context.Context, n tenant.NewAdoption, agrees func(t tenant.Tenant, first []byte) error, actor tenant.Actor) (tenant.BegunAdoption, error)
	Adoption(ctx context.Context, id uuid.UUID) (tenant.Adoption, error)
	HasAdoption(ctx context.Context, id tenant.ID, dryRun bool) (bool, error)
	LeaseAdoptions(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedAdoption, error)
	ReserveAdoption(ctx context.Context, a tenant.LeasedAdoption) (bool, error)
	HoldAdopted(ctx context.Context, a tenant.LeasedAdoption, key tenant.SealedKey, scopes []string, actor tenant.Actor) error
	EndAdoption(ctx context.Context, a tenant.LeasedAdoption, state tenant.AdoptionState, problem *tenant.Problem, actor tenant.Actor) error

	Beat(ctx context.Context, pat []byte) (tenant.Beat, error)
	RetireApps(ctx context.Context) (int, error)
	Recovery(ctx context.Context) (tenant.Recovery, error)
	RecoveryStatus(ctx context.Context) (tenant.Recovery, error)
	EndRecovery(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error)
	TakeOver(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error)
	RemoveRetired(ctx context.Context, f tenant.RetiredFilter, count int, actor tenant.Actor) error
	LeaseControl(ctx context.Context, force bool) (tenant.ControlTurn, error)
	ExamineControl(ctx context.Context, t tenant.ControlTurn, record *tenant.ControlRecord) (is tenant.Recovery, write bool, err error)
	DeferControl(ctx context.Context, t tenant.ControlTurn, delay time.Duration) error
	ControlWritten(ctx context.Context, t tenant.ControlTurn, problem *tenant.Problem) error
	Leave(ctx context.Context) (last bool, err error)

	BeginQuarantine(ctx context.Context, key tenant.SealedKey, actor tenant.Actor) error
	QuarantineState(ctx context.Context, fingerprint []byte) (tenant.UnknownKey, error)
	LeaseQuarantine(ctx context.Context, lease time.Duration) (tenant.UnknownKey, error)
	EndQuarantine(ctx context.Context, k tenant.UnknownKey, found tenant.AdoptedKey, app tenant.AppID, problem *tenant.Problem) error
	QuarantineSetback(ctx context.Context, k tenant.UnknownKey, s tenant.Setback) error

	Finding(ctx context.Context, number int64) (tenant.Finding, error)
	Decide(ctx context.Context, number int64, kind tenant.FindingKind, choice tenant.RepairAction, actor tenant.Actor) (int, error)
	StartDueDecisions(ctx context.Context, id uuid.UUID) (bool, error)
	AdoptFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey, dead []uuid.UUID) error
	EndFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey) error
	KeysListed(ctx context.Context, a tenant.App, found []tenant.AdoptedKey, actor tenant.Actor) error
	KeysOfApp(ctx context.Context, app tenant.AppID) ([]tenant.SealedKey, error)
	SuspendDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	RestoreDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	RemovalDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	OwnerDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	Contested(ctx context.Context, a tenant.App, f tenant.Finding, problem tenant.Problem, retry tenant.Setback) error

	StartReport(ctx context.Context, id uuid.UUID, actor tenant.Actor) (tenant.Reconciliation, error)
	StartRepair(ctx context.Context, id uuid.UUID, token string, actor tenant.Actor) (tenant.Reconciliation, error)
	StartDueReport(ctx context.Context, id uuid.UUID, every time.Duration, actor tenant.Actor) (bool, error)
	Reconciliation(ctx context.Context, id uuid.UUID) (tenant.Reconciliation, error)
	LeaseReconciliations(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Reconciliation, error)
	EndReconciliation(ctx context.Context, r tenant.Reconciliation) (was, is tenant.Recovery, err error)
	SmallerPages(ctx context.Context, r tenant.Reconciliation) (bool, error)
	SawApps(ctx context.Context, r tenant.Reconciliation, apps []tenant.ListedApp, last bool) error
	SawKeys(ctx context.Context, r tenant.Reconciliation, keys []tenant.ListedKey) error
	Compare(ctx context.Context, r tenant.Reconciliation) error
	TurnTo(ctx context.Context, r tenant.Reconciliation, phase tenant.ReconciliationPhase) error
	NextFinding(ctx context.Context, r tenant.Reconciliation, state tenant.FindingState) (tenant.Finding, error)
	ConfirmFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	DropFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	EndFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, state tenant.FindingState, note string) error
	CountFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, map[tenant.FindingState]int, error)
	CountOpenFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, error)
	LastReport(ctx context.Context) (tenant.Reconciliation, error)
	KeyOf(ctx context.Context, f tenant.Finding) (tenant.SealedKey, []string, error)
	AdoptApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error
	RemoveApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	RevokeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.SealedKey) error
	ForgetApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	DiscardApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	RemakeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.NewKeyRow) error
	KeyRescoped(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	MarkAgain(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error
	RemovalsInLastHour(ctx context.Context) (n int, until time.Duration, err error)
	SetFirstAttributes(ctx context.Context, id tenant.ID, a tenant.Attributes, actor tenant.Actor) (tenant.Tenant, error)

	ReserveSlot(ctx context.Context, r tenant.SlotRequest) (tenant.Slot, error)
	SlotHolds(ctx context.Context, epoch int64) (bool, error)
	UpstreamFailed(ctx context.Context, f tenant.UpstreamFailure) (pause time.Duration, err error)
	UpstreamWorks(ctx context.Context, epoch int64) (resumed bool, err error)
	Interrupt(ctx context.Context, epoch int64, perSecond float64, probeTimeout time.Duration, reason tenant.Problem) (tenant.Slot, error)
	RefusePAT(ctx context.Context, fingerprint []byte, problem tenant.Problem, base, most time.Duration) (news bool, err error)
	PATWorks(ctx context.Context, fingerprint []byte) (news bool, err error)
	ClaimPATCheck(ctx context.Context, fingerprint []byte, in time.Duration) (free bool, wait time.Duration, err error)
	BeginPATCheck(ctx context.Context, fingerprint []byte, trust, limit time.Duration) (works, check bool, err error)
	Upstream(ctx context.Context, pat []byte) (tenant.UpstreamStatus, error)

	Claim(ctx context.Context, profile string, actor tenant.Actor) (int, error)
	StartBuilds(ctx context.Context, n tenant.NextBuilds) error
	PlanPools(ctx context.Context, profiles []tenant.Profile, plan tenant.PoolPlan, actor tenant.Actor) error
	ClaimInBackground(ctx context.Context, p tenant.Profile, actor tenant.Actor) error
	DefaultKeyOf(ctx context.Context, app tenant.AppID) (tenant.SealedKey, error)
	KeyProven(ctx context.Context, a tenant.App) error
	MemberDead(ctx context.Context, a tenant.App, actor tenant.Actor) error
	RemakeHeldKey(ctx context.Context, a tenant.App, gone uuid.UUID, next uuid.UUID, actor tenant.Actor) error
	Pools(ctx context.Context, names []string) ([]tenant.Pool, tenant.PoolLoad, error)
	EndDueKeys(ctx context.Context, actor tenant.Actor) error
	SettleTenants(ctx context.Context, actor tenant.Actor) error
	PurgeWait(ctx context.Context, perHour int) (time.Duration, error)
	BeginPurge(ctx context.Context, a tenant.App, perHour int, actor tenant.Actor) (wait time.Duration, err error)
	DueWork(ctx context.Context, kind tenant.WorkKind, slots [tenant.Priorities]int) ([]tenant.DueWork, error)
	WorkDue(kind tenant.WorkKind) <-chan struct{}
	Release(ctx context.Context, l tenant.Lease, delay time.Duration) error
	SetBack(ctx context.Context, l tenant.Lease, s tenant.Setback) error
	ForgetAdoptions(ctx context.Context) error
	MakeAuditPartitions(ctx context.Context) error
	SealAudit(ctx context.Context, patience time.Duration) (tenant.Sealing, error)

	Sealed(ctx context.Context) (tenant.Sealed, error)
	CountSealed(ctx context.Context) (tenant.SealedCounts, error)
	Reseal(ctx context.Context, by tenant.SealKeyID, after uuid.UUID, most int, seal func(id uuid.UUID, ciphertext []byte) []byte) (tenant.Resealed, error)
	ResealProbe(ctx context.Context, old, sealed []byte, actor tenant.Actor) (bool, error)
	MarkAnew(ctx context.Context, by []tenant.SealKeyID, most int) (int, error)
	TenantCounts(ctx context.Context) ([]tenant.TenantCount, error)
	FoldTenantCounts(ctx context.Context) error

	NoteProfiles(ctx context.Context, profiles []tenant.Profile) error
	StartCampaign(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (tenant.Campaign, error)
	StartDueRotation(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (bool, error)
	CountKeys(ctx context.Context, f tenant.KeyFilter) (int, error)
	ChangeCampaign(ctx context.Context, id uuid.UUID, change tenant.CampaignChange, actor tenant.Actor) (c tenant.Campaign, changed bool, err error)
	LeaseCampaigns(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Campaign, error)
	SettleCampaign(ctx context.Context, c tenant.Campaign, actor tenant.Actor) (tenant.Settling, error)
	CountCampaign(ctx context.Context, c tenant.Campaign) (tenant.Campaign, error)
	RotateSome(ctx context.Context, c tenant.Campaign, ids []uuid.UUID, actor tenant.Actor) (tenant.Campaign, error)
	Misfits(ctx context.Context, profile, revision string, after tenant.AppID, limit int) ([]tenant.Misfit, error)
	NextMisfit(ctx context.Context, c tenant.Campaign) (tenant.Misfit, error)
	KeyRescopedTo(ctx context.Context, c tenant.Campaign, m tenant.Misfit, k tenant.MisfitKey, scopes []string, actor tenant.Actor) error
	Conformed(ctx context.Context, c tenant.Campaign, m tenant.Misfit, ids []uuid.UUID, actor tenant.Actor) (bool, error)
	LeaveMisfit(ctx context.Context, c tenant.Campaign, m tenant.Misfit, state tenant.CampaignItemState, problem tenant.Problem) error
	CountCampaigns(ctx context.Context) (map[tenant.CampaignKind]map[tenant.CampaignState]int, error)
}

// An Upstream is Clarifai, as one operator. Each method makes one call and does
// not repeat it. Failures are *tenant.UpstreamError.
type Upstream interface {
	Whoami(ctx context.Context, pat tenant.Secret) (tenant.UserID, error)
	CreateApp(ctx context.Context, app tenant.NewApp) error
	App(ctx context.Context, id tenant.AppID) (tenant.UpstreamApp, error)
	AppOf(ctx context.Context, owner tenant.UserID, id tenant.AppID) (tenant.UpstreamApp, error)
	Apps(ctx context.Context, p tenant.Page) ([]tenant.UpstreamApp, error)
	MarkApp(ctx context.Context, id tenant.AppID, marker tenant.Marker, description string) error
	ChangeApp(ctx context.Context, id tenant.AppID, change tenant.AppChange) error
	DeleteApp(ctx context.Context, id tenant.AppID) error
	CreateApps(ctx context.Context, apps []tenant.NewApp) error
	CreateKey(ctx context.Context, key tenant.NewKey) (tenant.Secret, error)
	CreateKeys(ctx context.Context, keys []tenant.NewKey) ([]tenant.Secret, error)
	AppKeys(ctx context.Context, id tenant.AppID, page int) ([]tenant.UpstreamKey, error)
	Keys(ctx context.Context, p tenant.Page) ([]tenant.UpstreamKey, error)
	KeyExists(ctx context.Context, key tenant.Secret) error
	Opens(ctx context.Context, key tenant.Secret) (tenant.OpenedApp, error)
	SetKeyScopes(ctx context.Context, key tenant.Secret, scopes []string) error
	DeleteKey(ctx context.Context, key tenant.Secret) error
}

// A Config is what a Service is made of. Zero durations and counts take the
// defaults named.
type Config struct {
	Store      Store
	Upstream   Upstream
	PAT        *PAT // that Upstream uses
	Keyring    *keyring.Keyring
	Deployment tenant.Deployment // from Pin
	Profiles   []tenant.Profile  // one of them named tenant.DefaultProfile
	Log        *zap.Logger
	Metrics    *Metrics

	KeysetSource *keyring.Source // that Keyring is of; nil for one that is not read again

	AppPrefix   string        // begins every app id
	Rate        float64       // upstream calls a second, of all replicas together
	CallTimeout time.Duration // of one upstream call; 5 s
	WorkTimeout time.Duration // of one attempt at a row: at least two calls; 15 s
	Lease       time.Duration // of a row, longer than WorkTimeout; 20 s
	Settle      time.Duration // how late an unclear call may still land; 60 s
	SweepEvery  time.Duration // 1 s
	SealEvery   time.Duration // how often the audit log is sealed; 30 s
	LookAgain   time.Duration // how often a waiting request reads its row, should a wake-up be lost; 2 s
	MaxBuilds   int           // builds of one profile at once; 64
	// ItemsPerCall is how many apps, or keys, builds that nobody waits for have made by
	// one call at most; 1.
	ItemsPerCall int
	// MaxRotations is how many rotations of one campaign are under way at once; as many
	// as the rate allows calls in 4 s, from 8 to 200.
	MaxRotations int
	AgeEvery     time.Duration // how often a replica looks for keys that are too old; 10 min
	BackoffBase  time.Duration // after the first failure; 1 s
	BackoffCap   time.Duration // 30 s

	ReportEvery  time.Duration // Clarifai is compared with the database by itself; 24 h
	RemovalCap   int           // what repairs may remove in an hour, and of how many tenants the apps; 100
	PoolEvery    time.Duration // pools are planned; 15 s
	PoolPatience time.Duration // with which more apps are kept ready than are needed; 10 min
	SkipMarks    bool          // leave tenants out of the markers of their apps

	TripAfter    int           // calls in a row that Clarifai fails before all work pauses; 5
	PauseBase    time.Duration // the first pause; 1 s
	PauseCap     time.Duration // 30 s
	PATCheckBase time.Duration // after which a refused PAT is tried again; 15 s
	PATCheckCap  time.Duration // 5 min
	// PATTrust is how long a PAT that passed a check is trusted when Clarifai refuses the credential of
	// calls about single apps and keys; a quarter of it for other calls. 10 s.
	PATTrust time.Duration
}

// A ConfigError is a fault of one field of a Config, or of its profiles.
type ConfigError struct {
	Field  string // as the struct has it; of a profile as a profiles file has it
	Detail string
}

func (e *ConfigError) Error() string { return e.Detail }

// Validate reports every fault of c: a joined error of *ConfigError.
func (c Config) Validate() error {
	var faults []error
	fault := func(field, format string, args ...any) {
		faults = append(faults, &ConfigError{Field: field, Detail: fmt.Sprintf(format, args...)})
	}
	if !tenant.ValidAppPrefix(c.AppPrefix) {
		fault("AppPrefix", "app prefix %q must be 1 to 5 characters of a-z and 0-9", c.AppPrefix)
	}
	if !(c.Rate > 0) || math.IsInf(c.Rate, 0) { // NaN is not more than 0 either
		fault("Rate", "upstream rate %v must be more than 0 calls a second", c.Rate)
	}
	faults = append(faults, checkProfiles(c.Profiles)...)
	if c.WorkTimeout < 2*c.CallTimeout {
		fault("CallTimeout", "upstream timeout %s is too long: an attempt of %s makes two calls", c.CallTimeout, c.WorkTimeout)
	}
	if c.Lease <= c.WorkTimeout {
		fault("Lease", "lease %s must be longer than the limit of an attempt %s", c.Lease, c.WorkTimeout)
	}
	return errors.Join(faults...)
}

// WithDefaults returns c with its zero fields set.
func (c Config) WithDefaults() Config {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.CallTimeout, 5 * time.Second},
		{&c.WorkTimeout, 15 * time.Second},
		{&c.Lease, 20 * time.Second},
		{&c.Settle, time.Minute},
		{&c.SweepEvery, time.Second},
		{&c.SealEvery, 30 * time.Second},
		{&c.LookAgain, 2 * time.Second},
		{&c.BackoffBase, time.Second},
		{&c.BackoffCap, 30 * time.Second},
		{&c.ReportEvery, 24 * time.Hour},
		{&c.AgeEvery, 10 * time.Minute},
		{&c.PoolEvery, 15 * time.Second},
		{&c.PoolPatience, 10 * time.Minute},
		{&c.PauseBase, time.Second},
		{&c.PauseCap, 30 * time.Second},
		{&c.PATCheckBase, 15 * time.Second},
		{&c.PATCheckCap, 5 * time.Minute},
		{&c.PATTrust, 10 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if c.MaxBuilds == 0 {
		c.MaxBuilds = 64
	}
	if c.MaxRotations == 0 {
		c.MaxRotations = int(min(200, max(8, 4*c.Rate)))
	}
	if c.ItemsPerCall == 0 {
		c.ItemsPerCall = 1
	}
	if c.RemovalCap == 0 {
		c.RemovalCap = 100
	}
	if c.TripAfter == 0 {
		c.TripAfter = 5
	}
	return c
}

// A Service is the engine. It is safe for use by many goroutines.
type Service struct {
	Config
	profiles   map[string]tenant.Profile
	calls      sync.Map // by callTurn, a chan struct{} that the one call holds that waits for a slot
	reread     rereading
	controlDue chan struct{} // holds one while the control record or an unknown key is due
	apps       gatherer[tenant.NewApp, struct{}]
	keys       gatherer[tenant.NewKey, tenant.Secret]

	recoveryMu sync.Mutex
	recovery   tenant.Recovery      // as it was last logged; guarded by recoveryMu
	pause      tenant.UpstreamPause // the same

	drainOnce sync.Once
	draining  chan struct{} // closed by Drain
}

// New makes a Service. It reports every fault of the configuration at once.
func New(c Config) (*Service, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s := &Service{Config: c, profiles: map[string]tenant.Profile{}, draining: make(chan struct{}), controlDue: make(chan struct{}, 1)}
	for _, p := range c.Profiles {
		s.profiles[p.Name] = p
	}
	s.apps.s, s.apps.call, s.apps.post = s, callCreateApp, s.postApps
	s.keys.s, s.keys.call, s.keys.post = s, callCreateKey, s.postKeys
	s.watchUnknown()
	return s, nil
}

// worker is who changes what no caller asked for.
var worker = tenant.Actor{Name: "worker"}

// A SignedUp is what came of a sign-up.
type SignedUp struct {
	Tenant tenant.Tenant
	// Created says that this sign-up made the tenant, rather than found it.
	Created bool
	// Key and Secret are the tenant's default key, of a tenant that this sign-up made and
	// that had an app at once; Secret is unset otherwise, and Reveal shows it.
	Key    tenant.Key
	Secret tenant.Secret
}

// SignUp makes a tenant, or finds it, and waits for wait until it is active. The
// tenant it returns may still be provisioning: workers go on.
//
// The next generation of a tenant that is deleted begins, or with up.Replace of one
// that is being deleted.
//
// It reports tenant.Invalid for attributes or a profile that cannot be,
// tenant.Conflict for a tenant that was signed up otherwise or is being deleted, and
// tenant.ErrOutside for one that actor may not change.
func (s *Service) SignUp(ctx context.Context, id tenant.ID, up tenant.SignUp, wait time.Duration, actor tenant.Actor) (SignedUp, error) {
	var got SignedUp
	up.Within = actor.Within
	if err := up.Validate(); err != nil {
		return got, err
	}
	profile, err := s.profileOf(up)
	if err != nil {
		return got, err
	}

	// Watch before writing, so that no wake-up falls between.
	changed, stop := s.Store.Watch(id)
	defer stop()
	n := tenant.NewTenant{ID: id, Profile: profile, Attributes: up.Attributes(), BuildID: s.newAppID(), Limits: s.buildLimits()}
	signedUp, err := s.Store.SignUp(ctx, n, actor)
	if err != nil {
		return got, err
	}
	if state := signedUp.Tenant.State; state == tenant.Deleted || up.Replace && (state == tenant.Deleting || state == tenant.Purging) {
		n.Again = true
		if signedUp, err = s.Store.SignUp(ctx, n, actor); err != nil {
			return got, err
		}
	}
	got.Tenant, got.Created = signedUp.Tenant, signedUp.Created
	if !actor.Within.Covers(got.Tenant.Labels) {
		return SignedUp{}, tenant.ErrOutside
	}
	if _, most := profile.PoolBounds(); got.Created && most > 0 {
		s.Metrics.signedUp(profile.Name, got.Tenant.State == tenant.Active)
	}
	if signedUp.FirstUnknown() {
		if got.Tenant, err = s.Store.SetFirstAttributes(ctx, id, up.Attributes(), actor); err != nil {
			return got, lostIfNotFound(err)
		}
	} else if !got.Created {
		if err := agrees(up, got.Tenant, signedUp.FirstHash); err != nil {
			return got, err
		}
	}
	if r := signedUp.Revealed; r != nil {
		got.Key = r.Key
		got.Secret, err = s.open(r.Key.ID, r.Ciphertext)
		return got, err
	}
	if wait > 0 {
		got.Tenant, err = s.awaitWritten(ctx, got.Tenant, wait, changed, actor.Within)
	}
	return got, err
}

// open opens the sealed secret of a key.
func (s *Service) open(id uuid.UUID, ciphertext []byte) (tenant.Secret, error) {
	secret, err := s.Keyring.Open(id, ciphertext)
	if err != nil {
		return secret, fmt.Errorf("open key %s: %w", id, err)
	}
	return secret, nil
}

func (s *Service) profileOf(up tenant.SignUp) (tenant.Profile, error) {
	profile, ok := s.profiles[up.ProfileName()]
	if !ok {
		return profile, &tenant.Error{Kind: tenant.Invalid, Code: "profile_unknown", Field: "profile",
			Detail: "there is no such profile; there are: " + strings.Join(s.profileNames(), ", ")}
	}
	return profile, nil
}

// agrees reports tenant.Conflict if up asks for something other than the tenant
// that is there.
func agrees(up tenant.SignUp, t tenant.Tenant, first []byte) error {
	switch t.State {
	case tenant.Deleting, tenant.Purging, tenant.Deleted:
		e := tenant.Errorf(tenant.Conflict, "tenant_deleting",
			"the tenant is %s; ?on_deleting=replace begins its next generation, with an app of its own", t.State)
		e.State, e.Allowed = t.State, t.State.Allows()
		return e
	}
	if fields := up.Differs(t, first); len(fields) > 0 {
		return tenant.Errorf(tenant.Conflict, "attributes_differ",
			"the tenant was signed up with another %s; send what it has, or leave it out", strings.Join(fields, " and "))
	}
	return nil
}

// Tenant reads a tenant, and waits for wait until it has reached a state that
// it stays in.
func (s *Service) Tenant(ctx context.Context, id tenant.ID, wait time.Duration) (tenant.Tenant, error) {
	changed, stop := s.Store.Watch(id)
	defer stop()
	t, err := s.Store.Tenant(ctx, id)
	if err != nil || wait <= 0 {
		return t, err
	}
	return s.await(ctx, t, wait, changed)
}

// Retry tries now what a tenant waits for, instead of when it is due. It returns
// the tenant as it stands, and tenant.NotFound for an unknown one.
func (s *Service) Retry(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error) {
	return s.Store.Retry(ctx, id, actor)
}

// await returns t as it stands when it stays so, when wait has passed or when
// the service drains.
func (s *Service) await(ctx context.Context, t tenant.Tenant, wait time.Duration, changed <-chan struct{}) (tenant.Tenant, error) {
	read := false // t is fresh
	err := s.awaitThat(ctx, wait, changed, func() (bool, error) {
		if read {
			is, err := s.Store.Tenant(ctx, t.ID)
			if err != nil {
				return false, err
			}
			t = is
		}
		read = true
		return t.Settled(), nil
	})
	return t, err
}

// errLost is returned to a request whose own change was committed, and is no longer in the
// database when the request reads it again. "Not found", or the state from before the change, would
// make the caller give up or believe the wrong state.
var errLost = &tenant.Error{Kind: tenant.Unavailable, Code: "database_unavailable", RetryAfter: 2 * time.Second,
	Detail: "the change was made, but was lost when the database failed over or was restored; repeat the request"}

// lostIfNotFound returns errLost if err says that a row is missing which this request has written or
// found.
func lostIfNotFound(err error) error {
	if errors.Is(err, tenant.NotFound) && !errors.Is(err, tenant.ErrOutside) {
		return errLost
	}
	return err
}

// committed returns the error of a request whose change is committed, and which could not be read again.
// The change is made and goes on: that is no failure, and what was read before is true. errLost is one.
func (s *Service) committed(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, errLost) || errors.Is(ctx.Err(), context.Canceled) { // or the caller went away
		return err
	}
	s.Log.Warn("change committed, and its progress cannot be read", zap.Error(err))
	return nil
}

// awaitWritten is await for a request that has written or found t. It returns errLost if the row of t
// is missing, or older than t. Once the tenant is not within the scope of the request any more, it returns
// what was read before.
func (s *Service) awaitWritten(ctx context.Context, t tenant.Tenant, wait time.Duration, changed <-chan struct{}, within tenant.Scope) (tenant.Tenant, error) {
	is := t
	err := s.awaitThat(ctx, wait, changed, func() (bool, error) {
		if is.Settled() {
			return true, nil
		}
		next, err := s.Store.Tenant(ctx, t.ID)
		switch {
		case err != nil:
			return false, lostIfNotFound(err)
		case next.Version < t.Version:
			return false, errLost
		case !within.Covers(next.Labels):
			return true, nil
		}
		is = next
		return is.Settled(), nil
	})
	return is, s.committed(ctx, err)
}

// awaitThat looks until what it looks at is so, wait has passed or the service
// drains: now, whenever changed says so and now and then. It returns the error of a
// look.
func (s *Service) awaitThat(ctx context.Context, wait time.Duration, changed <-chan struct{}, look func() (bool, error)) error {
	if wait <= 0 {
		return nil
	}
	ok, err := look()
	if ok || err != nil {
		return err
	}
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	again := time.NewTicker(s.LookAgain)
	defer again.Stop()
	for {
		last := false
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.draining:
			return nil
		case <-deadline.C:
			last = true // with the problem there may be by now
		}
		if ok, err := look(); ok || last || err != nil {
			return err
		}
	}
}

// Drain makes the requests that wait answer now. The work goes on.
func (s *Service) Drain() { s.drainOnce.Do(func() { close(s.draining) }) }

// Reveal opens the secret of a tenant's active key, and writes that it was asked
// for. It reports tenant.NotFound for an unknown tenant or key.
func (s *Service) Reveal(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, tenant.Secret, error) {
	key, ciphertext, err := s.Store.Reveal(ctx, id, name, actor)
	if err != nil {
		return key, tenant.Secret{}, err
	}
	secret, err := s.open(key.ID, ciphertext)
	return key, secret, err
}

// Identify finds whose a key or an app is, and writes that it was asked for. A secret,
// if it is set, counts. It reports tenant.NotFound for what was never ours.
func (s *Service) Identify(ctx context.Context, secret tenant.Secret, what tenant.Suspect, actor tenant.Actor) (tenant.Identified, error) {
	if secret.IsSet() {
		what = tenant.Suspect{Fingerprint: s.Keyring.Fingerprint(secret)}
	}
	return s.Store.Identify(ctx, what, actor)
}

// UpstreamStatus reads what is known of Clarifai and of the work that waits for
// it, and how this replica last found its PAT.
func (s *Service) UpstreamStatus(ctx context.Context) (tenant.UpstreamStatus, PATHealth, error) {
	_, fingerprint, _ := s.PAT.current()
	status, err := s.Store.Upstream(ctx, fingerprint)
	health := s.PAT.Health()
	switch {
	case health.State == PATForeign:
	case status.PATRefused != nil:
		health.State, health.Since = PATRefused, status.PATRefused.Since
	case health.State == PATRefused, status.PauseReason != nil && status.PauseReason.Code == problems[tenant.UpstreamPAT].code:
		health.State = PATUnknown // it is being checked
	}
	return status, health, err
}

func (s *Service) profileNames() []string {
	names := make([]string, 0, len(s.Profiles))
	for _, p := range s.Profiles {
		names = append(names, p.Name)
	}
	slices.Sort(names)
	return names
}

// newAppID makes an id of at most 32 characters that sorts by time.
func (s *Service) newAppID() tenant.AppID {
	return tenant.AppID(s.AppPrefix + "-" + strings.ToLower(ulid.Make().String()))
}

func (s *Service) newAppIDs(n int) []tenant.AppID {
	ids := make([]tenant.AppID, n)
	for i := range ids {
		ids[i] = s.newAppID()
	}
	return ids
}
