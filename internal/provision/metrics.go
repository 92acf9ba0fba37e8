package provision

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Metrics are what the engine measures of itself.
type Metrics struct {
	work          *prometheus.CounterVec
	sweepFailures *prometheus.CounterVec
	buildSeconds  prometheus.Histogram
	tenants       *prometheus.GaugeVec
	recovery      *prometheus.GaugeVec
	undecided     prometheus.Gauge
	retired       *prometheus.GaugeVec
	controlFails  prometheus.Gauge
	paused        prometheus.Gauge
	manualPause   *prometheus.GaugeVec
	patRefused    prometheus.Gauge
	findings      *prometheus.GaugeVec
	reportedAt    prometheus.Gauge
	sealedUpTo    prometheus.Gauge
	keysetKeys    *prometheus.GaugeVec
	resealLeft    prometheus.Gauge
	unknownKeys   prometheus.Gauge
	importing     prometheus.Gauge
	callItems     *prometheus.HistogramVec

	campaigns                                    *prometheus.GaugeVec
	campaignItems                                *prometheus.CounterVec
	poolReady, poolTarget, poolMin, poolBuilding *prometheus.GaugeVec
	poolHits, poolMisses                         *prometheus.CounterVec
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		work: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tenantry_work_total", Help: "Attempts of workers at a row, by the kind of row and outcome.",
		}, []string{"kind", "outcome"}),
		buildSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tenantry_build_duration_seconds", Help: "The last, successful try of a build, its upstream calls included.",
			Buckets: []float64{.05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 15},
		}),
		tenants: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tenantry_tenants", Help: "Tenants by state, read every 15 seconds.",
		}, []string{"state"}),
	}
	m.sweepFailures = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tenantry_sweep_failures_total", Help: "Failed turns of the steps of the sweep, by step. A step that fails again and again needs attention; the log says why it fails."}, []string{"step"})
	reg.MustRegister(m.sweepFailures)
	m.recovery = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_recovery_mode", Help: "1 for the state of recovery mode: watching, recovering, or stopped (another database is in use)."}, []string{"state"})
	m.undecided = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_recovery_undecided_findings", Help: "Findings of the newest report that wait for a decision."})
	m.retired = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_retired_apps", Help: "Apps of earlier incarnations of the database that no tenant is known to hold, up to 1,000 per profile. Each start of Postgres retires the pools. Retired apps count against the account's quota."}, []string{"profile"})
	m.controlFails = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_control_record_failing", Help: "1 while the control record cannot be read or written: a copy of the database would not be detected."})
	reg.MustRegister(m.recovery, m.undecided, m.retired, m.controlFails)
	m.paused = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_upstream_paused", Help: "1 while no call is made because Clarifai fails or throttles."})
	m.manualPause = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_upstream_manual_pause", Help: "1 for the scope of a pause by an operator: all work at Clarifai, or removals. It lasts until tenantry upstream resume."}, []string{"scope"})
	reg.MustRegister(m.manualPause)
	m.patRefused = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_upstream_pat_refused", Help: "1 while Clarifai refuses the operator's PAT."})
	m.findings = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_report_findings", Help: "What the last report found, by kind, that no repair has ended since."}, []string{"kind"})
	m.reportedAt = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_report_timestamp_seconds", Help: "When the last report ended; 0 before the first."})
	m.sealedUpTo = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_audit_sealed_timestamp_seconds", Help: "Up to when every event of the audit log is sealed; 0 before the first turn."})
	reg.MustRegister(m.sealedUpTo)
	m.keysetKeys = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_keyset_key", Help: "1 for each key of the keyset in use, by its id; the primary seals."}, []string{"key_id", "primary"})
	m.resealLeft = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_reseal_remaining", Help: "Keys of tenants that are still to be sealed anew after a rotation of the keyset, counted every 15 seconds."})
	m.unknownKeys = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_keyset_missing_keys", Help: "Keys that sealed something in the database and that this replica's keyset lacks."})
	reg.MustRegister(m.keysetKeys, m.resealLeft, m.unknownKeys)
	m.importing = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tenantry_importing_tenants", Help: "Those of the tenants provisioning that wait in the background, from batches, read every 15 seconds."})
	m.callItems = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "tenantry_upstream_call_items", Help: "Apps or keys that a call was to make which builds in the background may share.",
		Buckets: []float64{1, 2, 5, 10, 20, 50, 100}}, []string{"call"})
	reg.MustRegister(m.importing, m.callItems)
	m.campaigns = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_campaigns", Help: "Campaigns that have not ended, by kind and state, counted every 15 seconds."}, []string{"kind", "state"})
	m.campaignItems = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tenantry_campaign_items_total", Help: "Keys that campaigns rotated and apps that they brought to another revision, by outcome."}, []string{"kind", "outcome"})
	reg.MustRegister(m.campaigns, m.campaignItems)
	m.poolReady = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_pool_ready", Help: "Apps that are ready to be handed out, counted every 15 seconds."}, []string{"profile"})
	m.poolTarget = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_pool_target", Help: "Apps that shall be ready, as demand has it."}, []string{"profile"})
	m.poolMin = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_pool_min", Help: "The least apps that the profile wants ready."}, []string{"profile"})
	m.poolBuilding = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tenantry_pool_building", Help: "Apps that are being built, for the pool or for tenants that wait."}, []string{"profile"})
	m.poolHits = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tenantry_pool_hits_total", Help: "Sign-ups that had an app at once."}, []string{"profile"})
	m.poolMisses = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tenantry_pool_misses_total", Help: "Sign-ups that found no app ready."}, []string{"profile"})
	reg.MustRegister(m.poolReady, m.poolTarget, m.poolMin, m.poolBuilding, m.poolHits, m.poolMisses)
	reg.MustRegister(m.work, m.buildSeconds, m.tenants, m.paused, m.patRefused, m.findings, m.reportedAt)
	return m
}

func (m *Metrics) worked(kind tenant.WorkKind, o outcome) {
	m.work.WithLabelValues(string(kind), string(o)).Inc()
}

// gathered notes for how many a call was made that builds may share.
func (m *Metrics) gathered(call string, items int) {
	m.callItems.WithLabelValues(call).Observe(float64(items))
}

// signedUp counts a sign-up of a profile that keeps a pool, by whether it had an app at
// once.
func (m *Metrics) signedUp(profile string, hit bool) {
	if hit {
		m.poolHits.WithLabelValues(profile).Inc()
	} else {
		m.poolMisses.WithLabelValues(profile).Inc()
	}
}

// measure reads what the metrics say of the whole fleet.
func (s *Service) measure(ctx context.Context) error {
	counts, err := s.Store.TenantCounts(ctx)
	if err != nil {
		return err
	}
	byState, importing := map[tenant.State]int{}, 0
	for _, c := range counts {
		byState[c.State] += c.Tenants
		if c.State == tenant.Provisioning && c.Background {
			importing += c.Tenants
		}
	}
	for _, state := range tenant.States {
		s.Metrics.tenants.WithLabelValues(string(state)).Set(float64(byState[state]))
	}
	s.Metrics.importing.Set(float64(importing))
	recovery, err := s.Store.RecoveryStatus(ctx)
	if err != nil {
		return err
	}
	for _, state := range []tenant.RecoveryState{tenant.Watching, tenant.Recovering, tenant.Stopped} {
		s.Metrics.recovery.WithLabelValues(string(state)).Set(oneIf(recovery.State == state))
	}
	s.Metrics.undecided.Set(float64(recovery.Undecided))
	s.Metrics.controlFails.Set(oneIf(recovery.ControlProblem != nil))
	upstream, pat, err := s.UpstreamStatus(ctx)
	if err != nil {
		return err
	}
	s.Metrics.paused.Set(oneIf(upstream.Pauses > 0))
	for _, scope := range tenant.PauseScopes {
		s.Metrics.manualPause.WithLabelValues(string(scope)).Set(oneIf(upstream.Pause.Scope == scope))
	}
	s.Metrics.patRefused.Set(oneIf(pat.State == PATRefused))
	campaigns, err := s.Store.CountCampaigns(ctx)
	if err != nil {
		return err
	}
	for _, kind := range tenant.CampaignKinds {
		for _, state := range tenant.CampaignStates {
			if state != tenant.CampaignDone {
				s.Metrics.campaigns.WithLabelValues(string(kind), string(state)).Set(float64(campaigns[kind][state]))
			}
		}
	}
	pools, err := s.pools(ctx, upstream)
	if err != nil {
		return err
	}
	for _, p := range pools {
		s.Metrics.poolReady.WithLabelValues(p.Profile).Set(float64(p.Ready + p.Outdated))
		s.Metrics.poolTarget.WithLabelValues(p.Profile).Set(float64(p.Target))
		s.Metrics.poolMin.WithLabelValues(p.Profile).Set(float64(p.Fewest))
		s.Metrics.poolBuilding.WithLabelValues(p.Profile).Set(float64(p.Building))
		s.Metrics.retired.WithLabelValues(p.Profile).Set(float64(p.Retired))
	}
	report, err := s.Store.LastReport(ctx)
	if errors.Is(err, tenant.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	open, err := s.Store.CountOpenFindings(ctx, report)
	if err != nil {
		return err
	}
	for _, kind := range tenant.FindingKinds {
		s.Metrics.findings.WithLabelValues(string(kind)).Set(float64(open[kind]))
	}
	s.Metrics.reportedAt.Set(float64(report.FinishedAt.UnixMilli()) / 1000)
	return nil
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
