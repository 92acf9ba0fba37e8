package provision_test

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A crashScenario brings a replica to the crash points that it names.
type crashScenario struct {
	points []string
	// prepare makes the world as it is before, with a replica that is stopped
	// afterwards. Without it, the replica that dies is the world's first.
	prepare func(s *scene)
	// options and act are of the replica that dies, which also works.
	options provisiontest.Options
	act     func(s *scene)
	// recover is what changes before the next replica starts, settle what is done
	// then.
	recover, settle func(s *scene)

	newcomers []tenant.ID // who signs up in act
	differs   bool        // Clarifai and Postgres still do, until another repair
	control   bool        // the control record is kept
	moves     bool        // tenants get other apps: theirs was gone
	pool      int         // apps that are there for nobody
	spare     int         // apps that may be there for nobody beside those
	foreign   int         // apps that are not ours
	retired   int         // kept apps, which an unknown tenant may use
	unmarked  bool        // apps lack their tenants in their markers
	lost      int         // keys that cannot be addressed
}

var crashScenarios = map[string]crashScenario{
	"first start": {
		points:    []string{"Pin Deployment", "Pin PinDeployment", "whoami Whoami"},
		act:       signUpSecond,
		newcomers: []tenant.ID{"user_2"},
	},
	"sign-up": {
		points: []string{
			"SignUp Watch", "SignUp SignUp",
			"lease LeaseApps", "makeApp BeginApp", "createApp CreateApp", "build AppMade", "makeKey BeginKey", "createKey CreateKey",
			"build FinishBuild", "tend AddExtraKeys", "tag MarkApp", "tag AppMarked 2", "reserve ReserveSlot",
			"steps MakeAuditPartitions", "steps NoteProfiles", "measure CountCampaigns", "SealAudit SealAudit", "steps Claim", "steps StartBuilds", "steps EndDueKeys", "steps SettleTenants", "start DueWork", "search WorkDue", "steps ForgetAdoptions", "steps FoldTenantCounts", "measure TenantCounts", "measure RecoveryStatus", "measure LastReport",
			"beat Beat", "startDueReports StartDueDecisions", "startDueReports StartDueReport",
		},
		prepare: first, act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"start in a pause": {
		points: []string{"whoami UpstreamWorks"},
		prepare: func(s *scene) {
			first(s)
			s.r.Stop()
			exec(s.t, s.w, `UPDATE upstream_budget SET pauses = 1, epoch = epoch + 1`)
		},
	},
	"sign-up without marks": {
		points:  []string{"tend AppMarked"},
		prepare: first, act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		options:  provisiontest.Options{Adjust: func(c *provision.Config) { c.SkipMarks = true }},
		unmarked: true,
	},
	"sign-up while listings are masked": {
		points: []string{"makeKey BeginKey", "createKey CreateKey", "build FinishBuild"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"masked_keys": true})
			first(s)
		},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"sign-up at a slow rate": {
		points:  []string{"reserve SlotHolds"},
		prepare: first, act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		options: provisiontest.Options{Adjust: func(c *provision.Config) { c.Rate = 5 }},
	},
	"sign-up that outlasts its wait": {
		points:  []string{"awaitWritten Tenant", "await Tenant"},
		prepare: faulty(map[string]any{"call": "PostApps", "hang": true}),
		act: func(s *scene) {
			_, _, _ = s.r.SignUp(s.t.Context(), "user_2", tenant.SignUp{}, 50*time.Millisecond, caller)
			_, _ = s.r.Tenant(s.t.Context(), "user_2", 50*time.Millisecond)
		},
		newcomers: []tenant.ID{"user_2"},
	},
	"sign-up of an adopted tenant": {
		points: []string{"SignUp SetFirstAttributes"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `UPDATE tenants SET attributes_hash = $1`, make([]byte, tenant.AttributesHashSize))
		},
		act: func(s *scene) { signUp(s.t, s.r, "user_1") },
	},
	"other requests": {
		points: []string{"Tenant Watch", "Tenant Tenant", "Retry Retry", "Reveal Reveal", "Identify Identify", "UpstreamStatus Upstream",
			"ProfileUses TenantCounts"},
		prepare: first,
		act: func(s *scene) {
			_, _ = s.r.Tenant(s.t.Context(), "user_1", 0)
			_, _ = s.r.Retry(s.t.Context(), "user_1", admin)
			_, secret := keyOf(s.t, s.r, "user_1")
			_, _ = s.r.Identify(s.t.Context(), secret, tenant.Suspect{}, caller)
			_, _, _ = s.r.UpstreamStatus(s.t.Context())
			_, _, _ = s.r.ProfileUses(s.t.Context())
		},
	},

	"campaign of rotations": {
		points: []string{"StartRotation StartCampaign", "CountRotation CountKeys", "lease LeaseCampaigns", "campaignStep SettleCampaign",
			"campaignStep CountCampaign", "campaignStep RotateSome", "release Release", "makeHeldKey FinishLeasedKey", "confirmEnd KeyEnded"},
		prepare: first,
		act: func(s *scene) {
			_, _ = s.r.CountRotation(s.t.Context(), tenant.KeyFilter{All: true}, noOverlap)
			startRotation(s.t, s.r, tenant.KeyFilter{All: true})
		},
		settle: rotatedOnce,
	},
	"campaign of rotations that is paused": {
		points:  []string{"ChangeCampaign ChangeCampaign"},
		prepare: first,
		act: func(s *scene) {
			c := startRotation(s.t, s.r, tenant.KeyFilter{All: true})
			_, _ = s.r.ChangeCampaign(s.t.Context(), c.ID, tenant.PauseCampaign, admin)
		},
		settle: func(s *scene) {
			for _, c := range campaigns(s) {
				if c.State == tenant.CampaignPaused {
					if _, err := s.r.ChangeCampaign(s.t.Context(), c.ID, tenant.ResumeCampaign, admin); err != nil {
						s.t.Fatal(err)
					}
				}
			}
			rotatedOnce(s)
		},
	},
	"campaign of rotations that Postgres refuses": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `ALTER TABLE campaign_items ADD CONSTRAINT none CHECK (false) NOT VALID`)
		},
		act:     func(s *scene) { startRotation(s.t, s.r, tenant.KeyFilter{All: true}) },
		recover: func(s *scene) { exec(s.t, s.w, `ALTER TABLE campaign_items DROP CONSTRAINT none`) },
		settle:  rotatedOnce,
	},
	"keys that are too old": {
		points: []string{"rotateAged StartDueRotation"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `UPDATE keys SET activated_at = now() - interval '2 hours'`)
		},
		options: provisiontest.Options{Adjust: func(c *provision.Config) {
			c.Profiles[0].MaxKeyAge, c.AgeEvery = time.Hour, time.Millisecond
		}},
		settle: rotatedOnce,
	},
	"profile that is applied": {
		points: []string{"ApplyProfile NoteProfiles", "ApplyProfile StartCampaign", "ProfileChanges Misfits", "conformNext NextMisfit", "conform SetKeyScopes",
			"conform KeyRescopedTo", "conform ChangeApp", "conformNext Conformed"},
		prepare: first, options: changedProfile, act: applyProfile, settle: conformed,
	},
	"profile that is refused to a tenant": {
		points:  []string{"leaveMisfit LeaveMisfit"},
		prepare: faulty(map[string]any{"call": "PatchKeys", "count": 1, "status": 11102}),
		options: changedProfile, act: applyProfile,
	},
	"profile that waits for the account": {
		points:  []string{"end SetBack"},
		prepare: faulty(map[string]any{"call": "PatchKeys", "count": 1, "status": 11006}),
		options: changedProfile, act: applyProfile, settle: conformed,
	},
	"profile that is applied when the replica shuts down": {
		points:  []string{"release Release"},
		prepare: faulty(map[string]any{"call": "PatchKeys", "hang": true}),
		options: changedProfile,
		act: func(s *scene) {
			applyProfile(s)
			stopDuring(s, "PatchKeys", 0)
		},
		settle: conformed,
	},

	"key that was never made, to be revoked": {
		points: []string{"revoke KeyEnded"},
		prepare: func(s *scene) {
			first(s)
			s.r.Stop()
			exec(s.t, s.w, `INSERT INTO keys (id, app_id, name, scopes, state) VALUES ($1, $2, 'old', '{All}', 'revoking')`, strayKey, s.holds["user_1"])
		},
	},

	"suspend": {
		points:  []string{"changed Watch", "Suspend Suspend", "lease LeaseKeys", "deleteKey DeleteKey", "confirmEnd KeyEnded"},
		prepare: first,
		act:     func(s *scene) { _, _ = s.r.Suspend(s.t.Context(), "user_1", wait, caller) },
		settle:  suspendedThenResumed,
	},
	"resume": {
		points: []string{"Resume Resume", "makeHeldKey BeginLeasedKey", "createKey CreateKey", "makeHeldKey FinishLeasedKey"},
		prepare: func(s *scene) {
			first(s)
			is, err := s.r.Suspend(s.t.Context(), "user_1", wait, caller)
			stateOf(s.t, is, err, tenant.Suspended)
		},
		act:    func(s *scene) { _, _ = s.r.Resume(s.t.Context(), "user_1", wait, caller) },
		settle: resumed,
	},
	"resume with a lost answer": {
		points: []string{"makeHeldKey ReplaceLeasedKey", "eachKey AppKeys"},
		prepare: func(s *scene) {
			first(s)
			is, err := s.r.Suspend(s.t.Context(), "user_1", wait, caller)
			stateOf(s.t, is, err, tenant.Suspended)
			s.w.Faults(map[string]any{"call": "PostKeys", "count": 1, "drop_before": true})
		},
		act:    func(s *scene) { _, _ = s.r.Resume(s.t.Context(), "user_1", wait, caller) },
		settle: resumed,
	},
	"delete": {
		points:  []string{"Delete Delete", "tag MarkApp", "confirmEnd KeyEnded"},
		prepare: first,
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", false, wait, caller) },
		settle: func(s *scene) {
			is, err := s.r.Delete(s.t.Context(), "user_1", false, wait, caller)
			stateOf(s.t, is, err, tenant.Deleting)
			if n := len(s.w.AppKeys()); n != 0 {
				s.t.Errorf("Clarifai has %d keys of a deleted tenant", n)
			}
			is, err = s.r.Restore(s.t.Context(), "user_1", wait, caller)
			stateOf(s.t, is, err, tenant.Active)
		},
	},
	"delete a tenant whose app is gone": {
		points: []string{"tag AppMarked"},
		prepare: func(s *scene) {
			first(s)
			marked(s.t, s.w)
			askClarifai(s.t, s.w, "DELETE", "/apps/"+s.w.Sim.Apps()[0].ID, nil)
		},
		act: func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", true, wait, caller) },
		settle: func(s *scene) {
			is, err := s.r.Delete(s.t.Context(), "user_1", true, wait, caller)
			stateOf(s.t, is, err, tenant.Deleted)
		},
		moves: true,
	},
	"restore": {
		points:  []string{"Restore Restore", "tag BeginTag", "tag MarkApp", "tag AppMarked 2", "makeHeldKey BeginLeasedKey"},
		prepare: deleted,
		act:     func(s *scene) { _, _ = s.r.Restore(s.t.Context(), "user_1", wait, caller) },
		settle: func(s *scene) {
			is, err := s.r.Restore(s.t.Context(), "user_1", wait, caller)
			stateOf(s.t, is, err, tenant.Active)
		},
	},
	"purge": {
		points: []string{"tag BeginTag", "tag MarkApp", "tag AppMarked 2", "purge PurgeWait", "inUse UnknownKeys", "beginPurge BeginPurge", "purge DeleteApp",
			"purge AppDeleted"},
		prepare: first,
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", true, wait, admin) },
		settle: func(s *scene) {
			purged(s, "user_1")
			if n := s.w.State().Apps; n != 0 {
				s.t.Errorf("Clarifai has %d apps of a tenant that was purged", n)
			}
		},
		moves: true,
	},
	"sign-up of a deleted tenant": {
		points: []string{"SignUp SignUp 2"},
		prepare: func(s *scene) {
			first(s)
			purged(s, "user_1")
		},
		act:   func(s *scene) { signUp(s.t, s.r, "user_1") },
		moves: true,
	},
	"further key": {
		points:  []string{"AddKey Watch", "AddKey AddKey", "AddKey Key", "makeHeldKey FinishLeasedKey"},
		prepare: first,
		act:     func(s *scene) { _, _, _ = s.r.AddKey(s.t.Context(), "user_1", more, wait, caller) },
		settle: func(s *scene) {
			key, _, err := s.r.AddKey(s.t.Context(), "user_1", more, wait, caller)
			if err != nil || key.State != tenant.KeyActive || len(s.w.AppKeys()) != 2 {
				s.t.Errorf("the further key is %s, %v, and Clarifai has %d keys", key.State, err, len(s.w.AppKeys()))
			}
			revokeMore(s)
		},
	},
	"revocation by a caller": {
		points: []string{"RevokeKey Watch", "RevokeKey RevokeKeyNamed", "RevokeKey Key"},
		prepare: func(s *scene) {
			first(s)
			if _, _, err := s.r.AddKey(s.t.Context(), "user_1", more, wait, caller); err != nil {
				s.t.Fatal(err)
			}
		},
		act:    func(s *scene) { _, _ = s.r.RevokeKey(s.t.Context(), "user_1", "more", wait, caller) },
		settle: revokeMore,
	},
	"rotation": {
		points: []string{"Rotate Watch", "Rotate StartRotation", "awaitRotation Rotation", "makeHeldKey BeginLeasedKey", "createKey CreateKey",
			"makeHeldKey FinishLeasedKey", "RevealNew RevealKey", "Rotation Watch", "Rotation Rotation", "ConfirmRotation ConfirmRotation",
			"confirmEnd KeyEnded"},
		prepare: first,
		act:     rotate,
		settle: func(s *scene) {
			rotate(s)
			rot, err := s.r.Rotation(s.t.Context(), "user_1", "default", "r1", 0)
			if err != nil || rot.State != tenant.RotationDone || rot.New.State != tenant.KeyActive {
				s.t.Errorf("the rotation is %+v, %v", rot, err)
			}
		},
	},
	"rotation with a lost answer": {
		points:  []string{"makeHeldKey ReplaceLeasedKey", "eachKey AppKeys", "confirmEnd KeyEnded"},
		prepare: faulty(map[string]any{"call": "PostKeys", "count": 1, "drop_before": true}),
		act:     rotate,
		settle:  rotate,
	},
	"quarantine": {
		points:  []string{"Quarantine Quarantine", "Quarantine Watch", "Quarantine Keys", "deleteKey DeleteKey", "makeHeldKey FinishLeasedKey"},
		prepare: first,
		act: func(s *scene) {
			_, secret := keyOf(s.t, s.r, "user_1")
			_, _ = s.r.Quarantine(s.t.Context(), secret, wait, admin)
		},
		settle: func(s *scene) {
			rest(s.t, s.w)
			if n := len(s.w.AppKeys()); n != 1 {
				s.t.Errorf("Clarifai has %d keys; want the successor", n)
			}
		},
	},
	"change of attributes": {
		points:  []string{"Update UpdateTenant"},
		prepare: first,
		act: func(s *scene) {
			name := "Bob"
			_, _ = s.r.Update(s.t.Context(), "user_1", tenant.Patch{DisplayName: &name}, anyVersion, caller)
		},
	},

	"adopt with a key": {
		points: []string{"Adopt Watch", "adoptNow BeginAdoption", "adoptNow Adoption", "adoptNow Tenant", "lease LeaseAdoptions",
			"lookAtAdoptable AppOf", "opens Opens", "checkGivenKey KeyExists", "carryOut ReserveAdoption", "tagAdopted Tenant", "tagAdopted MarkApp",
			"carryOut HoldAdopted", "tag MarkApp"},
		prepare: adoptable(true), act: adoptSecond, settle: adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adopt without a key": {
		points: []string{"tagAdopted MarkApp", "carryOut HoldAdopted", "makeHeldKey BeginLeasedKey", "createKey CreateKey", "makeHeldKey FinishLeasedKey",
			"tend AddExtraKeys"},
		prepare: adoptable(false), act: adoptSecond, settle: adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adopt an app of ours that the rows have lost": {
		points:  []string{"tagAdopted MarkApp", "carryOut HoldAdopted"},
		prepare: func(s *scene) { first(s); forgetSecond(s) },
		act:     func(s *scene) { _, _ = adopt(s.t, s.r, "user_2", lostApp(s)) },
		settle:  func(s *scene) { mustAdopt(s.t, s.r, "user_2", lostApp(s)) },
	},
	"adopt an app that is not there": {
		points:  []string{"workAdoption EndAdoption"},
		prepare: first,
		act:     func(s *scene) { _, _ = adopt(s.t, s.r, "user_2", tenant.AdoptRequest{AppID: "none"}) },
		settle: func(s *scene) {
			_, err := adopt(s.t, s.r, "user_2", tenant.AdoptRequest{AppID: "none"})
			refusedAs(s.t, err, "adopt_app_unknown", "")
		},
	},
	"adoption that is lost while its caller waits": {
		points: []string{"adoptNow HasAdoption"},
		prepare: func(s *scene) {
			adoptable(true)(s)
			s.w.Faults(map[string]any{"call": "GetApp", "http": 503})
		},
		act: func(s *scene) {
			conn := pgtest.Conn(s.t, s.w.URL)
			go func() {
				provisiontest.Eventually(s.t, "the adoption is lost", func() bool {
					tag, err := conn.Exec(s.t.Context(), `DELETE FROM adoptions`)
					return err == nil && tag.RowsAffected() > 0
				})
			}()
			_, _ = adopt(s.t, s.r, "user_2", handMadeWithKey(s, handMade))
		},
		settle:    func(s *scene) { s.w.Faults(); adoptedSecond(s) },
		newcomers: []tenant.ID{"user_2"},
	},
	"adopt: dry run": {
		points:  []string{"carryOut EndAdoption"},
		prepare: adoptable(true),
		act:     func(s *scene) { _, _ = adopt(s.t, s.r, "user_2", tenant.AdoptRequest{AppID: handMade, DryRun: true}) },
		settle:  adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adoption that fails": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			adoptable(true)(s)
			s.w.Faults(map[string]any{"call": "GetApp", "count": 1, "status": 98004})
		},
		act: adoptSecond, settle: adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adoption that Postgres refuses": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			adoptable(true)(s)
			exec(s.t, s.w, `ALTER TABLE apps ADD CONSTRAINT none_by_hand CHECK (id <> 'hand-made') NOT VALID`)
		},
		act:     adoptSecond,
		recover: func(s *scene) { exec(s.t, s.w, `ALTER TABLE apps DROP CONSTRAINT none_by_hand`) },
		settle:  adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adoption while the PAT is refused": {
		points:  []string{"release Release"},
		prepare: adoptable(true),
		act: func(s *scene) {
			s.w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
			adoptSecond(s)
		},
		recover: knowPAT, settle: adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adoption when the replica shuts down": {
		points: []string{"release Release"},
		prepare: func(s *scene) {
			adoptable(true)(s)
			s.w.Faults(map[string]any{"call": "GetApp", "hang": true})
		},
		act: func(s *scene) {
			before := s.w.State().Calls["GetApp"]
			_, _ = s.r.Adopt(s.t.Context(), "user_2", tenant.AdoptRequest{AppID: handMade}, tenant.SignUp{}, 0, caller)
			stopDuring(s, "GetApp", before)
		},
		settle: adoptedSecond, newcomers: []tenant.ID{"user_2"},
	},
	"adopt a shared app": {
		points: []string{"carryOut Recovery", "carryOut HoldAdopted", "leaveUnmarked AppMarked"},
		prepare: func(s *scene) {
			first(s)
			s.w.Shared("theirs")
		},
		act: func(s *scene) { _, _ = adopt(s.t, s.r, "user_2", sharedWithKey(s)) },
		settle: func(s *scene) {
			mustAdopt(s.t, s.r, "user_2", sharedWithKey(s))
			rest(s.t, s.w)
		},
		newcomers: []tenant.ID{"user_2"}, unmarked: true,
	},
	"suspend the tenant of a shared app": {
		points:  []string{"deleteKey DeleteKey", "end SetBack"},
		prepare: adoptedShared,
		act:     func(s *scene) { _, _ = s.r.Suspend(s.t.Context(), "user_2", wait, caller) },
		settle: func(s *scene) {
			deleteTheirs(s)
			sharedKeyAgain(s)
		},
		unmarked: true,
	},
	"suspend the tenant of a shared app whose key is gone": {
		points: []string{"confirmEnd KeyEnded"},
		prepare: func(s *scene) {
			adoptedShared(s)
			deleteTheirs(s)
		},
		act:      func(s *scene) { _, _ = s.r.Suspend(s.t.Context(), "user_2", wait, caller) },
		settle:   sharedKeyAgain,
		unmarked: true,
	},
	"purge of an adopted app that was never marked": {
		points: []string{"tag MarkApp"},
		prepare: func(s *scene) {
			adoptable(true)(s)
			adoptedSecond(s)
			rest(s.t, s.w)
			unmark(s, handMade)
			exec(s.t, s.w, `UPDATE apps SET marked_at = NULL, pending = false WHERE id = $1`, handMade)
		},
		act:    func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_2", true, 0, admin) },
		settle: func(s *scene) { purged(s, "user_2") },
	},
	"purge the tenant of a shared app": {
		points: []string{"letGo AppDeleted"},
		prepare: func(s *scene) {
			adoptedShared(s)
			delete(s.holds, "user_2")
		},
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_2", true, wait, admin) },
		settle:  func(s *scene) { purged(s, "user_2") },
		foreign: 1, lost: 1, unmarked: true,
	},

	"build that is refused": {
		points:  []string{"end SetBack"},
		prepare: faulty(map[string]any{"call": "PostApps", "count": 1, "status": 11006}),
		act:     signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"build that Postgres refuses": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `ALTER TABLE keys ADD CONSTRAINT none_active CHECK (state <> 'active') NOT VALID`)
		},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		recover: func(s *scene) { exec(s.t, s.w, `ALTER TABLE keys DROP CONSTRAINT none_active`) },
	},
	"build while Clarifai pauses": {
		points:  []string{"upstreamFailed UpstreamFailed", "send UpstreamWorks"},
		prepare: faulty(map[string]any{"call": "PostApps", "count": 1, "status": 11005}),
		act:     signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"build in doubt of its app": {
		points:  []string{"lookAt App"},
		prepare: faulty(map[string]any{"call": "PostApps", "count": 1, "drop_after": true}),
		act:     signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"build in doubt of its key": {
		points:  []string{"eachKey AppKeys", "makeKey GiveUpKey"},
		prepare: faulty(map[string]any{"call": "PostKeys", "count": 1, "drop_before": true}),
		act:     signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"build given up": {
		points: []string{"abandon AbandonApp", "purge DeleteApp", "release Release", "purge AppDeleted"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"masked_keys": true})
			faulty(map[string]any{"call": "PostKeys", "count": 1, "drop_after": true})(s)
		},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"build when the replica shuts down": {
		points:  []string{"release Release"},
		prepare: faulty(map[string]any{"call": "PostApps", "hang": true}),
		act: func(s *scene) {
			before := s.w.State().Calls["PostApps"]
			_, _, _ = s.r.SignUp(s.t.Context(), "user_2", tenant.SignUp{}, 0, caller)
			stopDuring(s, "PostApps", before)
		},
		newcomers: []tenant.ID{"user_2"},
	},
	"build of an app that another database gave away": {
		points: []string{"retire RetireApp"},
		prepare: func(s *scene) {
			first(s)
			app := forgetSecond(s)
			s.r.Stop()
			exec(s.t, s.w, `INSERT INTO apps (id, profile, profile_revision, in_doubt_since) VALUES ($1, 'default', 'x', now())`, app)
		},
		recover: anotherDatabase,
		settle: func(s *scene) {
			watched(s)
			report(s.t, s.r)
			decided(tenant.FoundAppForgotten, tenant.Adopt)(s)
		},
		control: true,
	},

	"pool": {
		points: []string{"keepPools PlanPools", "steps StartBuilds", "makeApp BeginApp", "createApp CreateApp", "makeKey BeginKey", "createKey CreateKey",
			"build FinishBuild", "pools Pools", "pools Recovery"},
		prepare: first, options: keepsPool, spare: 2,
	},
	"sign-up from the pool": {
		points:  []string{"SignUp SignUp", "tend AddExtraKeys", "tag MarkApp"},
		prepare: func(s *scene) { first(s); fillPool(s) },
		options: keepsPool, spare: 2,
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"pool of another revision": {
		points: []string{"steps StartBuilds", "build FinishBuild", "purge DeleteApp", "purge AppDeleted"},
		prepare: func(s *scene) {
			first(s)
			fillPool(s)
			exec(s.t, s.w, `UPDATE apps SET profile_revision = 'older' WHERE state = 'ready'`)
		},
		options: keepsPool, spare: 3,
	},
	"import": {
		points: []string{"signUpChunk SignUpMany", "makeApp BeginApp", "createApp CreateApp", "build AppMade", "makeKey BeginKey", "createKey CreateKey",
			"build FinishBuild", "tag MarkApp"},
		prepare: first, act: func(s *scene) { importAll(s.t, s.r, batchOf("imported", 3)) }, settle: imported,
		newcomers: imports,
	},
	"import with shared calls": {
		points:  []string{"makeApp BeginApp", "postApps CreateApps", "build AppMade", "makeKey BeginKey", "postKeys CreateKeys", "build FinishBuild"},
		prepare: first, options: sharesCalls, act: importTogether, settle: imported, newcomers: imports,
	},
	"import with shared calls while listings are masked": {
		points: []string{"postKeys CreateKeys"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"masked_keys": true})
			first(s)
		},
		options: sharesCalls, act: importTogether, settle: imported, newcomers: imports,
	},
	"import with shared calls that are refused": {
		points: []string{"postApps CreateApps", "lookAt App", "createApp CreateApp"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"several_items": "refused"})
			first(s)
		},
		options: sharesCalls, act: importTogether, settle: imported, newcomers: imports,
	},
	"import that gets apps of the pool": {
		points: []string{"steps ClaimInBackground", "steps StartBuilds"},
		prepare: func(s *scene) {
			first(s)
			fillPool(s)
			s.r.Stop()
			s.r = s.w.Start(provisiontest.Options{Idle: true})
			importAll(s.t, s.r, batchOf("imported", 3))
		},
		settle: imported, newcomers: imports,
	},
	"import of an adopted tenant": {
		points: []string{"endSignUp SetFirstAttributes"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `UPDATE tenants SET attributes_hash = $1`, make([]byte, tenant.AttributesHashSize))
		},
		act: func(s *scene) { importAll(s.t, s.r, []provision.BatchSignUp{{ID: "user_1"}}) },
	},
	"member of the pool that is looked at": {
		points:  []string{"defaultKeyDead DefaultKeyOf", "opens Opens", "prove KeyProven"},
		prepare: old, pool: 1,
	},
	"member of the pool that is dead": {
		points:  []string{"opens Opens", "defaultKeyDead KeyExists", "prove MemberDead"},
		prepare: func(s *scene) { old(s); loseKeyOf(s.t, s.w) },
		settle: func(s *scene) {
			provisiontest.Eventually(s.t, "the dead app is retired", func() bool { return appsIn(s.t, s.w, tenant.AppRetired) == 1 })
		},
		retired: 1,
	},
	"app that was in the pool for long": {
		points:  []string{"defaultKeyDead DefaultKeyOf", "opens Opens", "proveHeld KeyProven"},
		prepare: func(s *scene) { old(s); given(s) },
	},
	"app that was given with a dead key": {
		points:  []string{"defaultKeyDead KeyExists", "proveHeld RemakeHeldKey", "makeHeldKey BeginLeasedKey", "makeHeldKey FinishLeasedKey", "tag MarkApp"},
		prepare: func(s *scene) { old(s); loseKeyOf(s.t, s.w); given(s) },
	},

	"revocation": {
		points:  []string{"lease LeaseKeys", "deleteKey DeleteKey", "confirmEnd KeyEnded"},
		prepare: revoking(true, true),
	},
	"revocation that fails": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			s.w.Faults(map[string]any{"call": "DeleteKey", "count": 1, "status": 98004})
		},
	},
	"revocation that Postgres refuses": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			exec(s.t, s.w, `ALTER TABLE keys ADD CONSTRAINT none_revoked CHECK (state <> 'revoked') NOT VALID`)
		},
		recover: func(s *scene) { exec(s.t, s.w, `ALTER TABLE keys DROP CONSTRAINT none_revoked`) },
	},
	"revocation when the replica shuts down": {
		points: []string{"release Release"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			s.w.Faults(map[string]any{"call": "DeleteKey", "hang": true})
		},
		act: func(s *scene) { stopDuring(s, "DeleteKey", 0) },
	},
	"revocation of a key whose app is gone": {
		points: []string{"confirmEnd KeyEndUnconfirmed", "confirmEnd KeyEnded"},
		prepare: func(s *scene) {
			revoking(false, false)(s)
			askClarifai(s.t, s.w, "DELETE", "/apps/"+string(s.holds["user_1"]), nil)
		},
		differs: true, moves: true,
	},
	"revocation of a key that is hidden": {
		points: []string{"revoke KeyEnded 2"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"masked_keys": true})
			revoking(true, false)(s)
		},
		lost: 1,
	},
	"revocation of a key that never was": {
		points:  []string{"confirmEnd KeyEnded"},
		prepare: revoking(false, false),
	},
	"revocation in a pause": {
		points: []string{"release Release"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			exec(s.t, s.w, `UPDATE upstream_budget SET pauses = 1, paused_until = now() + interval '1 hour'`)
		},
	},
	"revocation that is not carried out": {
		points: []string{"deleteKey DeleteKey", "opens Opens", "deleteKey KeyEndUnconfirmed"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			s.w.Faults(map[string]any{"call": "DeleteKey", "status": 10000})
		},
	},
	"revocation of a key that cannot be decrypted": {
		points: []string{"eachKey AppKeys", "deleteKey DeleteKey", "confirmEnd KeyEnded"},
		prepare: func(s *scene) {
			revoking(true, true)(s)
			exec(s.t, s.w, `UPDATE keys SET ciphertext = 'x' WHERE id = $1`, strayKey)
		},
	},

	"PAT that could not be checked": {
		points: []string{"verifyPAT ClaimPATCheck", "checkPAT Whoami", "checkPAT PATWorks"},
		prepare: func(s *scene) {
			first(s)
			s.w.Faults(map[string]any{"call": "GetUser", "count": 1, "status": 98004})
		},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"PAT that is refused": {
		points:  []string{"confirmRefusal BeginPATCheck", "checkTurn Interrupt", "refusePAT RefusePAT"},
		prepare: first,
		act: func(s *scene) {
			s.w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
			signUpSecond(s)
		},
		recover:   knowPAT,
		newcomers: []tenant.ID{"user_2"},
	},
	"PAT that may not ask whose it is": {
		points:  []string{"lacksGetUser PATWorks"},
		prepare: first,
		act: func(s *scene) {
			s.w.Faults(map[string]any{"call": "GetUser", "status": 11007}, map[string]any{"call": "PostApps", "status": 11009, "count": 1})
			signUpSecond(s)
		},
		newcomers: []tenant.ID{"user_2"},
	},
	"PAT that is refused to a report": {
		points:  []string{"release Release"},
		prepare: first,
		act: func(s *scene) {
			s.w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
			startReport(s)
		},
		recover: knowPAT,
	},
	"new PAT": {
		points: []string{"takeOver Whoami", "takeOver PATWorks"},
		prepare: func(s *scene) {
			first(s)
			s.w.AddPAT(nextPAT, string(provisiontest.Operator))
		},
		act: func(s *scene) {
			s.r.WatchPAT(s.t.Context(), func() (tenant.Secret, error) { return tenant.NewSecret(nextPAT), nil }, 5*time.Millisecond)
		},
	},
	"rotation of the keyset": {
		points: []string{"reseal Sealed", "countLeft CountSealed", "resealFrom Reseal", "resealProbe ResealProbe", "reseal MarkAnew", "tag MarkApp"},
		prepare: func(s *scene) {
			first(s)
			s.r.Stop()
			rotateKeyset(s.t, s.w.Keyset, false)
			rereadKeyset(s)
		},
		settle: func(s *scene) { rekeyed(s.t, s.r.DB, primaryOf(s.t, s.w.Keys)) },
	},
	"rotation of the keyset while a replica runs": {
		points:  []string{"takeUpKeyset Sealed"},
		prepare: first,
		act: func(s *scene) {
			rotateKeyset(s.t, s.w.Keyset, false)
			s.r.KeysetSource = &keyring.Source{Path: s.w.Keyset}
			s.r.WatchKeyset(s.t.Context(), 5*time.Millisecond)
		},
		recover: rereadKeyset,
		settle:  func(s *scene) { rekeyed(s.t, s.r.DB, primaryOf(s.t, s.w.Keys)) },
	},
	"first start with a control record": {
		points: []string{"control LeaseControl", "readControl App", "useControl ExamineControl", "writeControl CreateApp",
			"writeControl ControlWritten", "createApp CreateApp"},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		control: true,
	},
	"control record that cannot be read": {
		points: []string{"controlFailed ControlWritten", "control DeferControl"},
		prepare: func(s *scene) {
			firstRecorded(s)
			s.r.Stop()
			s.w.Faults(map[string]any{"call": "GetApp", "status": 11007})
		},
		settle: func(s *scene) {
			provisiontest.Eventually(s.t, "the control record is read", func() bool {
				is, err := s.r.DB.Recovery(s.t.Context())
				return err == nil && is.ControlProblem == nil
			})
		},
		control: true,
	},
	"last replica that stops": {
		points:  []string{"LeaveControl Leave", "LeaveControl Recovery", "LeaveControl LeaseControl", "LeaveControl ExamineControl"},
		prepare: firstRecorded,
		act: func(s *scene) {
			controlRecorded(s.t, s.r)
			s.r.Stop()
		},
		control: true,
	},
	"database that was restarted": {
		points: []string{"beat RetireApps", "control LeaseControl", "readControl App", "useControl ExamineControl", "writeControl MarkApp",
			"writeControl ControlWritten", "build FinishBuild"},
		prepare: func(s *scene) {
			firstRecorded(s)
			fillPool(s)
			s.r.Stop()
			anotherDatabase(s)
		},
		act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		settle:  watched,
		control: true, retired: 1,
	},
	"database that was restored": {
		points: []string{"beat RetireApps", "useControl ExamineControl", "writeControl MarkApp", "startDueReports StartDueReport", "listApps Recovery",
			"endReconciliation EndReconciliation", "startDueReports StartDueDecisions", "adopt AdoptApp"},
		prepare: func(s *scene) {
			firstRecorded(s)
			forgetSecond(s)
			fillPool(s)
			s.r.Stop()
			anotherDatabase(s)
			exec(s.t, s.w, `
				BEGIN;
				SET LOCAL session_replication_role = replica;
				DELETE FROM audit_events WHERE id = (SELECT max(id) FROM audit_events);
				COMMIT`)
		},
		act: func(s *scene) {
			undecided(s.t, s.r)
			decided(tenant.FoundAppUnknown, tenant.Adopt)(s)
		},
		settle: func(s *scene) {
			provisiontest.Eventually(s.t, "recovery mode has ended, as decided", func() bool {
				// Before the next incarnation has begun, there is no recovery mode, either.
				began := len(column(s.t, s.w, `SELECT id::text FROM incarnations`)) > 1
				is, err := s.r.DB.RecoveryStatus(s.t.Context())
				if err == nil && is.State == tenant.Recovering && is.Undecided > 0 {
					decided(tenant.FoundAppUnknown, tenant.Adopt)(s)
				}
				return err == nil && began && !is.Active()
			})
		},
		control: true, retired: 1,
	},
	"take over": {
		points: []string{"TakeOver TakeOver", "useControl ExamineControl", "writeControl MarkApp"},
		prepare: func(s *scene) {
			firstRecorded(s)
			s.r.Stop()
			exec(s.t, s.w, provisiontest.SetRecovery(tenant.Stopped))
		},
		act: takeOver,
		settle: func(s *scene) {
			takeOver(s)
			inState(s.t, s.r, tenant.NotRecovering)
		},
		control: true,
	},
	"recovery mode that is ended by hand": {
		points: []string{"EndRecovery RecoveryStatus", "EndRecovery EndRecovery"},
		prepare: func(s *scene) {
			firstRecorded(s)
			s.r.Stop()
			exec(s.t, s.w, provisiontest.SetRecovery(tenant.Recovering))
		},
		act: endRecovery,
		settle: func(s *scene) {
			endRecovery(s)
			inState(s.t, s.r, tenant.NotRecovering)
		},
		control: true,
	},
	"retired app that is removed": {
		points:  []string{"RemoveRetired RemoveRetired", "purge DeleteApp", "purge AppDeleted"},
		prepare: retired, act: removeRetired(tenant.RetiredFilter{AppID: poolApp}, string(poolApp)),
		settle: retiredRemoved(tenant.RetiredFilter{AppID: poolApp}, string(poolApp)),
	},
	"retired apps that are removed": {
		points:  []string{"RemoveRetired RemoveRetired", "inUse UnknownKeys"},
		prepare: retired, act: removeRetired(tenant.RetiredFilter{Before: aYearOn}, "1"),
		settle: retiredRemoved(tenant.RetiredFilter{Before: aYearOn}, "1"),
	},
	"suspend a tenant of an earlier incarnation": {
		points: []string{"Suspend Suspend", "eachKey AppKeys", "tend KeysListed", "confirmEnd KeyEnded"},
		prepare: func(s *scene) {
			first(s)
			earlier(s)
			unknownKey(s)
		},
		act:    func(s *scene) { _, _ = s.r.Suspend(s.t.Context(), "user_1", wait, caller) },
		settle: suspendedThenResumed,
	},
	"quarantine of an unknown key": {
		points: []string{"Quarantine Quarantine", "quarantineUnknown BeginQuarantine", "quarantineUnknown Watch",
			"quarantineUnknown QuarantineState", "askUnknownKey LeaseQuarantine", "identifyKey Quarantine", "identifyKey Identify", "identifyKey EndQuarantine 3",
			"Quarantine Quarantine 2", "confirmEnd KeyEnded"},
		prepare: func(s *scene) { first(s); unknownKey(s) },
		act:     func(s *scene) { _, _ = s.r.Quarantine(s.t.Context(), leakedKey(s), wait, admin) },
		settle:  quarantined,
	},
	"quarantine of an unknown key that fails": {
		points: []string{"askUnknownKey QuarantineSetback"},
		prepare: func(s *scene) {
			first(s)
			unknownKey(s)
			s.w.Faults(map[string]any{"call": "MyScopes", "count": 1, "status": 98004})
		},
		act:    func(s *scene) { _, _ = s.r.Quarantine(s.t.Context(), leakedKey(s), wait, admin) },
		settle: quarantined,
	},
	"quarantine of an unknown key that may not name its app": {
		points: []string{"identifyKey KeyExists"},
		prepare: func(s *scene) {
			first(s)
			unknownKey(s)
			s.w.Faults(map[string]any{"call": "MyScopes", "status": 11007})
		},
		act:    func(s *scene) { _, _ = s.r.Quarantine(s.t.Context(), leakedKey(s), wait, admin) },
		settle: quarantined,
	},
	"quarantine of an unknown key that gets a row": {
		points: []string{"identifyKey EndQuarantine"},
		prepare: func(s *scene) {
			first(s)
			unknownKey(s)
			s.r.Stop()
			beginQuarantine(s.t, s.w, s.r, s.leaked)
			k := sealedAs(s.t, s.w, strayKey, s.leaked)
			exec(s.t, s.w, `
				INSERT INTO keys (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, retires_at, activated_at)
				VALUES ($1, $2, 'default', '{All}', 'retiring', $3, $4, $5, now() + interval '1 day', now())`,
				k.ID, s.holds["user_1"], k.Ciphertext, k.Fingerprint, k.Hint)
		},
		settle: quarantined,
	},
	"quarantine of a key that is dead": {
		points:  []string{"identifyKey EndQuarantine 2"},
		prepare: first,
		act:     func(s *scene) { _, _ = s.r.Quarantine(s.t.Context(), tenant.NewSecret(nextPAT), wait, admin) },
		settle: func(s *scene) {
			if _, err := s.r.Quarantine(s.t.Context(), tenant.NewSecret(nextPAT), wait, admin); !errors.Is(err, tenant.NotFound) {
				s.t.Errorf("the quarantine of a dead key ends with %v", err)
			}
		},
	},
	"campaign that meets a dead key of an earlier incarnation": {
		points: []string{"keyDead KeysOfApp", "opens Opens", "makeHeldKey KeyNotReplaced"},
		prepare: func(s *scene) {
			first(s)
			earlier(s)
			removeKey(s)
		},
		act: func(s *scene) { startRotation(s.t, s.r, tenant.KeyFilter{All: true}) },
		settle: func(s *scene) {
			cs := campaigns(s)
			if len(cs) == 0 {
				cs = append(cs, startRotation(s.t, s.r, tenant.KeyFilter{All: true}))
			}
			if c := ended(s.t, s.r, cs[0]); len(cs) != 1 || c.Done != 0 || c.Total != 1 {
				s.t.Errorf("there are %d campaigns, the last of which is %s", len(cs), counts(c))
			}
			report(s.t, s.r)
			decided(tenant.FoundKeyGone, tenant.SuspendTenant)(s)
			suspendedThenResumed(s)
		},
	},
	"purge beyond the removal cap": {
		points: []string{"purge PurgeWait", "removalCap SetBack"},
		prepare: func(s *scene) {
			first(s)
			signUp(s.t, s.r, "user_2")
			purged(s, "user_2")
		},
		options: provisiontest.Options{Adjust: func(c *provision.Config) { c.RemovalCap = 1 }},
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", true, 0, admin) },
		settle:  purgedFirst,
		moves:   true,
	},
	"purge of a deleted tenant": {
		points:  []string{"Delete Delete", "tag BeginTag", "tag MarkApp", "tag AppMarked 2", "beginPurge BeginPurge"},
		prepare: deleted,
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", true, wait, admin) },
		settle:  purgedFirst,
		moves:   true,
	},
	"restore of a tenant whose deletion was not recorded as tagged": {
		points:  []string{"tag MarkApp"},
		prepare: first,
		act:     func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", false, wait, caller) },
		recover: func(s *scene) {
			s.r = s.w.Start(provisiontest.Options{Idle: true})
			if _, err := s.r.Restore(s.t.Context(), "user_1", 0, caller); err != nil {
				s.t.Fatal(err)
			}
			s.r.Stop()
		},
		settle: func(s *scene) {
			is, err := s.r.Tenant(s.t.Context(), "user_1", wait)
			stateOf(s.t, is, err, tenant.Active)
		},
	},
	"restore that is taken back": {
		points:  []string{"Restore Restore", "tag BeginTag", "tag MarkApp", "tag AppMarked 2"},
		prepare: deleted,
		act:     func(s *scene) { _, _ = s.r.Restore(s.t.Context(), "user_1", wait, caller) },
		settle:  purgedFirst,
		moves:   true,
	},
	"purge of an app that has an unknown key": {
		points: []string{"inUse UnknownKeys", "contested Contested"},
		prepare: func(s *scene) {
			first(s)
			report(s.t, s.r)
			unknownKey(s)
		},
		act: func(s *scene) { _, _ = s.r.Delete(s.t.Context(), "user_1", true, 0, admin) },
		settle: func(s *scene) {
			contestedPurge(s)
			askClarifai(s.t, s.w, "DELETE", "/keys/"+s.leaked.Reveal(), nil)
			is, err := s.r.Tenant(s.t.Context(), "user_1", long)
			stateOf(s.t, is, err, tenant.Deleted)
		},
		moves: true,
	},
	"app whose tag names another tenant": {
		points: []string{"contested Contested"},
		prepare: func(s *scene) {
			first(s)
			tagAnother(s)
			s.r.Stop()
			exec(s.t, s.w, `UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now()`)
		},
		settle: func(s *scene) {
			provisiontest.Eventually(s.t, "the key is not shown", func() bool {
				_, _, err := s.r.Reveal(s.t.Context(), "user_1", tenant.DefaultKey, caller)
				return errors.Is(err, tenant.Conflict)
			})
			report(s.t, s.r)
			decided(tenant.FoundAppDiffers, tenant.OverwriteTag)(s)
		},
	},

	"report": {
		points: []string{
			"StartReport StartReport", "lease LeaseReconciliations", "listApps Apps", "listApps SawApps", "listKeys Keys",
			"listKeys SawKeys", "reconcile Compare", "reconcile Reconciliation", "confirmNext NextFinding", "confirmNext TurnTo",
			"endReconciliation EndReconciliation", "endReconciliation CountFindings",
		},
		prepare: first, act: startReport,
	},
	"report that fails": {
		points: []string{"smallerPages SmallerPages", "end SetBack"},
		prepare: func(s *scene) {
			first(s)
			s.w.Faults(map[string]any{"call": "ListApps", "count": 1, "status": 98009})
		},
		act: startReport,
	},
	"report that Postgres refuses": {
		points: []string{"end SetBack"},
		prepare: func(s *scene) {
			first(s)
			exec(s.t, s.w, `ALTER TABLE reconciliation_apps ADD CONSTRAINT none CHECK (false) NOT VALID`)
		},
		act:     startReport,
		recover: func(s *scene) { exec(s.t, s.w, `ALTER TABLE reconciliation_apps DROP CONSTRAINT none`) },
	},
	"report when the replica shuts down": {
		points: []string{"release Release"},
		prepare: func(s *scene) {
			first(s)
			s.w.Faults(map[string]any{"call": "ListApps", "hang": true})
		},
		act: func(s *scene) {
			before := s.w.State().Calls["ListApps"]
			startReport(s)
			stopDuring(s, "ListApps", before)
		},
	},
	"report of a list that passes an app over": {
		points: []string{"confirmNext DropFinding"},
		prepare: func(s *scene) {
			first(s)
			s.w.Faults(map[string]any{"call": "ListApps", "status": 10000})
		},
		act: startReport,
	},
	"report of an app that is gone": {
		points: []string{"confirmNext ConfirmFinding"},
		prepare: func(s *scene) {
			first(s)
			askClarifai(s.t, s.w, "DELETE", "/apps/"+string(s.holds["user_1"]), nil)
		},
		act: startReport, differs: true, moves: true,
	},
	"report of a key that is gone": {
		points:  []string{"keyExists KeyExists", "secretOf KeyOf"},
		prepare: func(s *scene) { first(s); removeKey(s) },
		act:     startReport, differs: true,
	},

	"decide: adopt": {
		points: []string{"Decide Finding", "Decide Decide", "startDueReports StartDueDecisions", "eachKey AppKeys", "opens Opens", "adopt AdoptApp",
			"measure CountOpenFindings"},
		prepare: reported(func(s *scene) { forgetSecond(s) }),
		act:     decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle:  decided(tenant.FoundAppUnknown, tenant.Adopt),
	},
	"decide: adopt an app that is gone": {
		points: []string{"adopt EndFinding"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeMarkedApp(s, ownedBy(s, "user_9")) })(s)
			removeStray(s)
		},
		act:    decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle: decided(tenant.FoundAppUnknown, tenant.Adopt),
	},
	"decide: adopt an app that lost its tag": {
		points: []string{"adopt EndFinding 2"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeMarkedApp(s, ownedBy(s, "user_9")) })(s)
			unmark(s, "t-stray")
		},
		act:    decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle: decided(tenant.FoundAppUnknown, tenant.Adopt), foreign: 1,
	},
	"decide: adopt an app of another keyset": {
		points: []string{"adopt EndFinding 3"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeMarkedApp(s, ownedBy(s, "user_9")) })(s)
			retag(s, "t-stray", map[string]any{"tenant": "nonsense"})
		},
		act:    decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle: func(s *scene) { decided(tenant.FoundAppUnknown, tenant.Adopt)(s); removeStray(s) },
	},
	"decide: adopt an app that is removed nobody knows when": {
		points: []string{"adopt EndFinding 4"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeMarkedApp(s, ownedBy(s, "user_9")) })(s)
			retag(s, "t-stray", map[string]any{"purge_after": "soon"})
		},
		act:    decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle: func(s *scene) { decided(tenant.FoundAppUnknown, tenant.Adopt)(s); removeStray(s) },
	},
	"repair: adopt a second app of a tenant": {
		points:  []string{"repairNext EndFinding 2"},
		prepare: reported(func(s *scene) { makeMarkedApp(s, ownedBy(s, "user_1")) }),
		act:     decided(tenant.FoundAppUnknown, tenant.Adopt),
		settle:  func(s *scene) { decided(tenant.FoundAppUnknown, tenant.Adopt)(s); removeStray(s) },
	},
	"decide: adopt a key": {
		points: []string{"adoptKey KeysOfApp", "adoptKey AdoptFoundKey"},
		prepare: reported(func(s *scene) {
			removeKey(s)
			unknownKey(s)
		}),
		act:    decided(tenant.FoundKeyUnknown, tenant.Adopt),
		settle: decided(tenant.FoundKeyUnknown, tenant.Adopt),
	},
	"decide: adopt a key that is gone": {
		points: []string{"adoptKey EndFinding"},
		prepare: func(s *scene) {
			reported(unknownKey)(s)
			askClarifai(s.t, s.w, "DELETE", "/keys/"+s.leaked.Reveal(), nil)
		},
		act:    decided(tenant.FoundKeyUnknown, tenant.Adopt),
		settle: decided(tenant.FoundKeyUnknown, tenant.Adopt),
	},
	"decide: adopt a key that is hidden": {
		points: []string{"adoptKey EndFinding 2"},
		prepare: func(s *scene) {
			reported(unknownKey)(s)
			s.w.Settings(map[string]any{"masked_keys": true})
		},
		act:     decided(tenant.FoundKeyUnknown, tenant.Adopt),
		recover: func(s *scene) { s.w.Settings(map[string]any{"masked_keys": false}) },
		settle:  endsUnknownKey,
	},
	"decide: adopt a key that works no longer": {
		points: []string{"adoptKey EndFinding 3"},
		prepare: func(s *scene) {
			reported(unknownKey)(s)
			s.w.Faults(map[string]any{"call": "MyScopes", "status": 11009})
		},
		act:    decided(tenant.FoundKeyUnknown, tenant.Adopt),
		settle: endsUnknownKey,
	},
	"decide: end a key": {
		points:  []string{"repair EndFoundKey", "confirmEnd KeyEnded"},
		prepare: reported(unknownKey),
		act:     decided(tenant.FoundKeyUnknown, tenant.EndUnknownKey),
		settle:  decided(tenant.FoundKeyUnknown, tenant.EndUnknownKey),
	},
	"decide: resume": {
		points:  []string{"adoptKey KeysOfApp", "adoptKey AdoptFoundKey"},
		prepare: reported(suspendedWithKey),
		act:     decided(tenant.FoundKeyContested, tenant.ResumeTenant),
		settle: func(s *scene) {
			decided(tenant.FoundKeyContested, tenant.ResumeTenant)(s)
			is, err := s.r.Tenant(s.t.Context(), "user_1", 0)
			stateOf(s.t, is, err, tenant.Active)
		},
	},
	"decide: end a key of a suspended tenant": {
		points:  []string{"repair EndFoundKey"},
		prepare: reported(suspendedWithKey),
		act:     decided(tenant.FoundKeyContested, tenant.EndUnknownKey),
		settle: func(s *scene) {
			decided(tenant.FoundKeyContested, tenant.EndUnknownKey)(s)
			rest(s.t, s.w) // the tenant is suspended all the time
			suspendedThenResumed(s)
		},
	},
	"decide: suspend": {
		points:  []string{"repair SuspendDecided", "tend KeysListed", "confirmEnd KeyEnded"},
		prepare: reported(func(s *scene) { earlier(s); removeKey(s) }),
		act:     decided(tenant.FoundKeyGone, tenant.SuspendTenant),
		settle: func(s *scene) {
			decided(tenant.FoundKeyGone, tenant.SuspendTenant)(s)
			is, err := s.r.Tenant(s.t.Context(), "user_1", wait)
			stateOf(s.t, is, err, tenant.Suspended)
			resumed(s)
		},
	},
	"decide: new key": {
		points:  []string{"repair RemakeKey", "createKey CreateKey", "makeHeldKey FinishLeasedKey"},
		prepare: reported(func(s *scene) { earlier(s); removeKey(s) }),
		act:     decided(tenant.FoundKeyGone, tenant.MakeKey),
		settle:  decided(tenant.FoundKeyGone, tenant.MakeKey),
	},
	"decide: new app": {
		points: []string{"repair ForgetApp", "build FinishBuild"},
		prepare: reported(func(s *scene) {
			earlier(s)
			askClarifai(s.t, s.w, "DELETE", "/apps/"+string(s.holds["user_1"]), nil)
		}),
		act:    decided(tenant.FoundAppGone, tenant.MakeApp),
		settle: decided(tenant.FoundAppGone, tenant.MakeApp), moves: true,
	},
	"decide: restore": {
		points:  []string{"repair RestoreDecided", "tend KeysListed", "tag MarkApp", "confirmEnd KeyEnded"},
		prepare: purgeContested,
		act:     decided(tenant.FoundPurge, tenant.RestoreTenant),
		settle: func(s *scene) {
			decided(tenant.FoundPurge, tenant.RestoreTenant)(s)
			is, err := s.r.Tenant(s.t.Context(), "user_1", wait)
			stateOf(s.t, is, err, tenant.Suspended)
			suspendedThenResumed(s)
		},
	},
	"decide: remove": {
		points:  []string{"repair RemovalDecided", "beginPurge BeginPurge", "purge DeleteApp"},
		prepare: purgeContested,
		act:     decided(tenant.FoundPurge, tenant.RemoveContested),
		settle: func(s *scene) {
			decided(tenant.FoundPurge, tenant.RemoveContested)(s)
			is, err := s.r.Tenant(s.t.Context(), "user_1", wait)
			stateOf(s.t, is, err, tenant.Deleted)
		},
		moves: true,
	},
	"decide: overwrite": {
		points:  []string{"overwriteTag Tenant", "overwriteTag MarkApp", "overwriteTag OwnerDecided"},
		prepare: reported(tagAnother),
		act:     decided(tenant.FoundAppDiffers, tenant.OverwriteTag),
		settle:  decided(tenant.FoundAppDiffers, tenant.OverwriteTag),
	},
	"decide: overwrite the tag of an app that is lost": {
		points: []string{"overwriteTag EndFinding"},
		prepare: func(s *scene) {
			reported(tagAnother)(s)
			s.r.Stop()
			s.r = s.w.Start(provisiontest.Options{Idle: true})
			decideOpen(s, tenant.FoundAppDiffers, tenant.OverwriteTag)
			// As if another repair had found that it is gone.
			app := s.holds["user_1"]
			askClarifai(s.t, s.w, "DELETE", "/apps/"+string(app), nil)
			exec(s.t, s.w, fmt.Sprintf(`
				UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL WHERE app_id = '%[1]s';
				UPDATE tenants SET state = 'provisioning', app_id = NULL WHERE app_id = '%[1]s';
				UPDATE apps SET state = 'deleted', pending = false WHERE id = '%[1]s'`, app))
		},
		settle: decided(tenant.FoundAppDiffers, tenant.OverwriteTag), moves: true,
	},

	"repair in recovery mode": {
		points: []string{"repairNext EndFinding"},
		prepare: func(s *scene) {
			reported(rescopeKey)(s)
			s.r.Stop()
			s.r = s.w.Start(provisiontest.Options{Idle: true})
			startRepair(s)
			exec(s.t, s.w, provisiontest.SetRecovery(tenant.Watching))
		},
		recover: func(s *scene) { exec(s.t, s.w, provisiontest.SetRecovery(tenant.NotRecovering)) },
		differs: true,
	},
	"repair: remove": {
		points: []string{"StartRepair StartRepair", "repairNext NextFinding", "repairNext TurnTo", "repairNext Recovery",
			"repairNext RemovalsInLastHour", "repair RemoveApp", "purge DeleteApp"},
		prepare: reported(func(s *scene) {
			makeMarkedApp(s, "")
			exec(s.t, s.w, `INSERT INTO apps (id, profile, profile_revision, state, updated_at)
				VALUES ('t-stray', 'default', 'x', 'deleted', now() - interval '1 day')`)
		}),
		act: startRepair,
	},
	"repair: revoke": {
		points:  []string{"eachKey AppKeys", "repair RevokeKey", "deleteKey DeleteKey"},
		prepare: reported(func(s *scene) { makeRevokedKey(s) }),
		act:     startRepair,
	},
	"repair: revoke a key that is gone": {
		points: []string{"repair EndFinding"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeRevokedKey(s) })(s)
			for _, k := range s.w.AppKeys() {
				if marker, ok := tenant.ParseKeyMarker(k.Description); ok && marker.KeyID == strayKey {
					askClarifai(s.t, s.w, "DELETE", "/keys/"+k.ID, nil)
				}
			}
		},
		act: startRepair,
	},
	"repair: revoke a key that is hidden": {
		points: []string{"repair EndFinding 2"},
		prepare: func(s *scene) {
			reported(func(s *scene) { makeRevokedKey(s) })(s)
			s.w.Settings(map[string]any{"masked_keys": true})
		},
		act:     startRepair,
		recover: func(s *scene) { s.w.Settings(map[string]any{"masked_keys": false}) },
		differs: true,
	},
	"repair: more removals than allowed": {
		points: []string{"repairNext SetBack"},
		prepare: reported(func(s *scene) {
			makeRevokedKey(s)
			exec(s.t, s.w, `INSERT INTO apps (id, profile, profile_revision, state, updated_at)
				VALUES ('t-stray', 'default', 'x', 'deleted', now() - interval '1 day')`)
			makeMarkedApp(s, "")
		}),
		options: provisiontest.Options{Adjust: func(c *provision.Config) { c.RemovalCap = 1 }},
		act:     startRepair,
	},
	"repair: rebuild": {
		points:  []string{"repair ForgetApp"},
		prepare: reported(func(s *scene) { askClarifai(s.t, s.w, "DELETE", "/apps/"+string(s.holds["user_1"]), nil) }),
		act:     startRepair, moves: true,
	},
	"repair: forget": {
		points: []string{"repair DiscardApp"},
		prepare: reported(func(s *scene) {
			fillPool(s)
			for _, k := range s.w.AppKeys() {
				if k.AppID == poolApp {
					askClarifai(s.t, s.w, "DELETE", "/keys/"+k.ID, nil)
				}
			}
		}),
		act: startRepair, retired: 1,
	},
	"repair: remake": {
		points:  []string{"repair RemakeKey", "makeHeldKey BeginLeasedKey", "createKey CreateKey", "makeHeldKey FinishLeasedKey"},
		prepare: reported(removeKey),
		act:     startRepair,
	},
	"repair: remake while listings are masked": {
		points: []string{"createKey CreateKey"},
		prepare: func(s *scene) {
			s.w.Settings(map[string]any{"masked_keys": true})
			reported(removeKey)(s)
		},
		act: startRepair, lost: 1,
	},
	"repair: rescope": {
		points:  []string{"repair SetKeyScopes", "repair KeyRescoped"},
		prepare: reported(rescopeKey),
		act:     startRepair,
	},
	"repair: rescope that is refused": {
		points: []string{"repairNext EndFinding 3"},
		prepare: func(s *scene) {
			reported(rescopeKey)(s)
			s.w.Faults(map[string]any{"call": "PatchKeys", "status": 11102})
		},
		act: startRepair, differs: true,
	},
	"repair: mark": {
		points:  []string{"repair MarkAgain", "tag MarkApp"},
		prepare: reported(func(s *scene) { unmark(s, s.holds["user_1"]) }),
		act:     startRepair,
	},
}

// keepsPool is a replica that keeps two apps ready.
var keepsPool = provisiontest.Options{Adjust: pool(2, 2)}

// old has an app in the pool that was not looked at for long.
func old(s *scene) {
	first(s)
	fillPool(s)
	s.r.Stop()
	aDayAgo(s.t, s.w)
}

// given has a tenant that got an app of the pool that was not looked at for long, by a
// replica that did no more.
func given(s *scene) {
	got, _, err := s.r.SignUp(s.t.Context(), "user_2", tenant.SignUp{}, 0, caller)
	if err != nil || got.AppID != poolApp {
		s.t.Fatalf("SignUp = %+v, %v; want the app of the pool", got, err)
	}
	s.holds["user_2"] = got.AppID
}

const (
	nextPAT = "00112233445566778899aabbccddeeff"
	poolApp = "t-pool"
)

var strayKey = uuid.MustParse("0190a000-0000-7000-8000-000000000001")

// first signs a tenant up who is there before the crash.
func first(s *scene) {
	s.holds["user_1"] = signUp(s.t, s.r, "user_1").AppID
	marked(s.t, s.w)
}

// deleted is first, and deletes the tenant.
func deleted(s *scene) {
	first(s)
	is, err := s.r.Delete(s.t.Context(), "user_1", false, wait, caller)
	stateOf(s.t, is, err, tenant.Deleting)
	rest(s.t, s.w)
}

// purged deletes a tenant, and waits until its app is gone.
func purged(s *scene, id tenant.ID) {
	is, err := s.r.Delete(s.t.Context(), id, true, wait, admin)
	if err != nil || is.State != tenant.Deleted {
		s.t.Fatalf("%s is %s, %v; want it deleted; its app: %v", id, is.State, err,
			column(s.t, s.w, `SELECT concat_ws(' ', id, state, purge_after, tagged_purge_after, problem) FROM apps WHERE tenant_id = $1`, string(id)))
	}
}

func purgedFirst(s *scene) { purged(s, "user_1") }

// faulty has faults for the replica that dies.
func faulty(rules ...map[string]any) func(*scene) {
	return func(s *scene) {
		first(s)
		s.w.Faults(rules...)
	}
}

// more is a further key.
var more = tenant.KeySpec{Name: "more", Scopes: []string{"Predict"}}

func revokeMore(s *scene) {
	key, err := s.r.RevokeKey(s.t.Context(), "user_1", "more", wait, caller)
	if err != nil || key.State != tenant.KeyRevoked || len(s.w.AppKeys()) != 1 {
		s.t.Errorf("the further key is %s, %v, and Clarifai has %d keys", key.State, err, len(s.w.AppKeys()))
	}
}

func suspendedThenResumed(s *scene) {
	is, err := s.r.Suspend(s.t.Context(), "user_1", wait, caller)
	stateOf(s.t, is, err, tenant.Suspended)
	if n := len(s.w.AppKeys()); n != 0 {
		s.t.Errorf("Clarifai has %d keys of a suspended tenant", n)
	}
	resumed(s)
}

func resumed(s *scene) {
	is, err := s.r.Resume(s.t.Context(), "user_1", wait, caller)
	stateOf(s.t, is, err, tenant.Active)
}

// rotate rotates the key of user_1 as a caller would, as often as it is called.
func rotate(s *scene) {
	hour := time.Hour
	rot, _, err := s.r.Rotate(s.t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: &hour}, wait, caller)
	if err != nil {
		s.t.Fatalf("rotate: %v", err)
	}
	if _, _, err := s.r.RevealNew(s.t.Context(), "user_1", rot.New, caller); err != nil {
		s.t.Fatalf("reveal the new key: %v", err)
	}
	if _, err := s.r.Rotation(s.t.Context(), "user_1", "default", "r1", wait); err != nil {
		s.t.Fatalf("read the rotation: %v", err)
	}
	if _, err := s.r.ConfirmRotation(s.t.Context(), "user_1", "default", "r1", caller); err != nil {
		s.t.Fatalf("confirm the rotation: %v", err)
	}
	rest(s.t, s.w)
}

const handMade = tenant.AppID("hand-made")

// adoptable has an app that was made by hand, with a key or without.
func adoptable(withKey bool) func(*scene) {
	return func(s *scene) {
		first(s)
		key := s.w.AppByHand(provisiontest.PAT, handMade, nil)
		if !withKey {
			s.w.Ask(provisiontest.PAT, "DELETE", "/keys/"+key.Reveal(), nil)
		}
	}
}

// handMadeWithKey asks for the app, with the key that was made by hand if there is one.
func handMadeWithKey(s *scene, id tenant.AppID) tenant.AdoptRequest {
	what := tenant.AdoptRequest{AppID: id}
	for _, k := range s.w.AppKeys() {
		if k.AppID == string(id) && k.Description == "by hand" {
			what.Key = tenant.NewSecret(k.ID)
		}
	}
	return what
}

// lostApp returns a request to adopt, with its key, the app of user_1 that has no row.
func lostApp(s *scene) tenant.AdoptRequest {
	known := signUp(s.t, s.r, "user_1").AppID
	for _, k := range s.w.AppKeys() {
		if k.AppID != string(known) {
			return tenant.AdoptRequest{AppID: tenant.AppID(k.AppID), Key: tenant.NewSecret(k.ID)}
		}
	}
	s.t.Fatal("Clarifai does not have the app, or no key of it")
	return tenant.AdoptRequest{}
}

func adoptSecond(s *scene) { _, _ = adopt(s.t, s.r, "user_2", handMadeWithKey(s, handMade)) }

func adoptedSecond(s *scene) {
	mustAdopt(s.t, s.r, "user_2", handMadeWithKey(s, handMade))
	var left int
	if err := pgtest.Conn(s.t, s.w.URL).QueryRow(s.t.Context(), `SELECT count(*) FROM adoptions`).Scan(&left); err != nil || left > 0 {
		s.t.Errorf("%d adoptions are left, %v", left, err)
	}
}

func sharedWithKey(s *scene) tenant.AdoptRequest {
	what := handMadeWithKey(s, "theirs")
	what.UserID = "bob"
	return what
}

func adoptedShared(s *scene) {
	first(s)
	s.w.Shared("theirs")
	mustAdopt(s.t, s.r, "user_2", sharedWithKey(s))
	s.holds["user_2"] = "theirs"
}

func deleteTheirs(s *scene) {
	s.w.Ask(provisiontest.TheirPAT, "DELETE", "/keys/"+sharedWithKey(s).Key.Reveal(), nil)
}

// sharedKeyAgain waits until the suspension has taken effect, and gives another key.
func sharedKeyAgain(s *scene) {
	is, err := s.r.Suspend(s.t.Context(), "user_2", wait, caller)
	stateOf(s.t, is, err, tenant.Suspended)
	s.w.KeyByHand(provisiontest.TheirPAT, "theirs")
	mustAdopt(s.t, s.r, "user_2", sharedWithKey(s))
}

var imports = []tenant.ID{"imported_0000", "imported_0001", "imported_0002"}

// sharesCalls is a replica whose builds have time to gather between two calls.
var sharesCalls = provisiontest.Options{Adjust: func(c *provision.Config) { c.Rate, c.ItemsPerCall = 20, 10 }}

// importTogether has all of an import wait for the same slot.
func importTogether(s *scene) {
	exec(s.t, s.w, pgtest.NextSlotIn(500*time.Millisecond))
	importAll(s.t, s.r, batchOf("imported", len(imports)))
}

// imported runs an import again, and waits until all have their apps: nobody has come for
// them, which would hurry them.
func imported(s *scene) {
	importAll(s.t, s.r, batchOf("imported", len(imports)))
	conn := pgtest.Conn(s.t, s.w.URL)
	provisiontest.Eventually(s.t, "all that were imported are active", func() bool {
		return countOf(s.t, conn, `tenants WHERE background AND state = 'active'`) == len(imports)
	})
}

func signUpSecond(s *scene) { signUp(s.t, s.r, "user_2") }

// stopDuring stops the replica while it makes another call than those before.
func stopDuring(s *scene, call string, before int) {
	provisiontest.Eventually(s.t, call+" is under way", func() bool { return s.w.State().Calls[call] > before })
	s.r.Stop()
}

func knowPAT(s *scene) { s.w.AddPAT(provisiontest.PAT, string(provisiontest.Operator)) }

// rereadKeyset has the world's keyring be what its file is.
func rereadKeyset(s *scene) {
	if err := s.w.Keys.Replace(loadKeyset(s.t, s.w.Keyset)); err != nil {
		s.t.Fatal(err)
	}
}

func startReport(s *scene) {
	if _, err := s.r.StartReport(s.t.Context(), admin); err != nil {
		s.t.Fatalf("start report: %v", err)
	}
}

func campaigns(s *scene) []tenant.Campaign {
	cs, err := s.r.DB.Campaigns(s.t.Context(), uuid.Nil, 10)
	if err != nil {
		s.t.Fatal(err)
	}
	return cs
}

// rotatedOnce sees the campaign end that was begun, or begins it if it was not, and the
// key rotated once.
func rotatedOnce(s *scene) {
	cs := campaigns(s)
	if len(cs) == 0 {
		cs = append(cs, startRotation(s.t, s.r, tenant.KeyFilter{All: true}))
	}
	if c := ended(s.t, s.r, cs[0]); len(cs) != 1 || c.Done != 1 || c.Total != 1 {
		s.t.Errorf("there are %d campaigns, the last of which is %s", len(cs), counts(c))
	}
	if got := rotatedKeys(s.t, s.w); len(got) != 1 {
		s.t.Errorf("%v were rotated; want one key", got)
	}
}

var changedProfile = provisiontest.Options{Adjust: func(c *provision.Config) {
	c.Profiles[0].BaseWorkflow, c.Profiles[0].KeyScopes = "General", []string{"All", "Predict"}
}}

func applyProfile(s *scene) {
	_, _ = s.r.ProfileChanges(s.t.Context(), tenant.DefaultProfile, "", 10)
	if _, err := s.r.ApplyProfile(s.t.Context(), tenant.DefaultProfile, admin); err != nil {
		s.t.Fatalf("apply the profile: %v", err)
	}
}

// conformed sees a campaign end that was begun, by a replica that has another revision
// of the profile.
func conformed(s *scene) {
	for _, c := range campaigns(s) {
		wantCounts(s.t, ended(s.t, s.r, c), "done [1 1 0 0 0]")
		if got := column(s.t, s.w, `SELECT scopes::text || a.profile_revision FROM keys k JOIN apps a ON a.id = k.app_id`); len(got) != 1 ||
			got[0] != "{All,Predict}"+c.Revision {
			s.t.Errorf("the key and its app are %q", got)
		}
	}
}

// firstRecorded is first, and waits until the control record is written.
func firstRecorded(s *scene) {
	first(s)
	controlRecorded(s.t, s.r)
}

// anotherDatabase starts the next incarnation, as after a restart of the server.
func anotherDatabase(s *scene) {
	exec(s.t, s.w, `UPDATE current_incarnation SET apps_file = 'another'`)
}

// watched waits until the next incarnation has started and found that nothing is lost.
func watched(s *scene) {
	conn := pgtest.Conn(s.t, s.w.URL)
	provisiontest.Eventually(s.t, "the next incarnation has begun", func() bool { return countOf(s.t, conn, `incarnations`) == 2 })
	inState(s.t, s.r, tenant.NotRecovering)
}

// earlier makes the apps of tenants those of an earlier incarnation.
func earlier(s *scene) {
	exec(s.t, s.w, `UPDATE apps SET incarnation = gen_random_uuid(); UPDATE keys SET incarnation = gen_random_uuid()`)
}

// retired makes an app of the pool one of an earlier incarnation.
func retired(s *scene) {
	first(s)
	fillPool(s)
	exec(s.t, s.w, `UPDATE apps SET state = 'retired', incarnation = gen_random_uuid() WHERE state = 'ready'`)
}

// aYearOn is later than the begin of all apps.
var aYearOn = time.Now().AddDate(1, 0, 0)

func removeRetired(f tenant.RetiredFilter, confirm string) func(*scene) {
	return func(s *scene) {
		err := s.r.RemoveRetired(s.t.Context(), f, confirm, admin)
		if err != nil && !errors.Is(err, tenant.NotFound) && !errors.Is(err, tenant.Conflict) { // it is done
			s.t.Fatal(err)
		}
	}
}

func retiredRemoved(f tenant.RetiredFilter, confirm string) func(*scene) {
	return func(s *scene) {
		removeRetired(f, confirm)(s)
		provisiontest.Eventually(s.t, "the app is removed", func() bool { return appsIn(s.t, s.w, tenant.AppDeleted) == 1 })
	}
}

func endRecovery(s *scene) {
	if _, err := s.r.EndRecovery(s.t.Context(), s.r.Deployment.ID, admin); err != nil {
		s.t.Fatal(err)
	}
}

func takeOver(s *scene) {
	if _, err := s.r.TakeOver(s.t.Context(), s.r.Deployment.ID, admin); err != nil && !errors.Is(err, tenant.Conflict) {
		s.t.Fatal(err)
	}
}

// unknownKey creates a key for the app of user_1, with our ownership tag and without a row.
func unknownKey(s *scene) {
	makeKeyByHand(s.t, s.w, s.holds["user_1"], tenant.KeyMarker{Deployment: s.r.Deployment.ID, KeyID: strayKey}.String())
	s.leaked = leakedKey(s)
}

// leakedKey is the key of unknownKey.
func leakedKey(s *scene) tenant.Secret {
	for _, k := range s.w.AppKeys() {
		if marker, ok := tenant.ParseKeyMarker(k.Description); ok && marker.KeyID == strayKey {
			return tenant.NewSecret(k.ID)
		}
	}
	s.t.Fatal("Clarifai does not have the key")
	return tenant.Secret{}
}

func suspendedWithKey(s *scene) {
	suspended(s.t, s.r, "user_1")
	unknownKey(s)
}

func quarantined(s *scene) {
	q, err := s.r.Quarantine(s.t.Context(), s.leaked, wait, admin)
	if err != nil || q.Key.State != tenant.KeyRevoked || q.TenantID != "user_1" || len(s.w.AppKeys()) != 1 {
		s.t.Errorf("the quarantine is %+v, %v, and Clarifai has %d keys", q, err, len(s.w.AppKeys()))
	}
}

// endsUnknownKey makes a report, and decides to end the key of unknownKey.
func endsUnknownKey(s *scene) {
	decided(tenant.FoundKeyUnknown, tenant.Adopt)(s)
	rest(s.t, s.w)
	report(s.t, s.r)
	decided(tenant.FoundKeyUnknown, tenant.EndUnknownKey)(s)
}

// contestedPurge waits until the removal of the app of user_1 waits for a decision.
func contestedPurge(s *scene) {
	conn := pgtest.Conn(s.t, s.w.URL)
	provisiontest.Eventually(s.t, "the removal is contested", func() bool {
		return countOf(s.t, conn, `apps WHERE state = 'retained' AND problem ->> 'code' = 'purge_contested'`) == 1
	})
}

// purgeContested makes a report that shows an app whose removal waits for a decision.
func purgeContested(s *scene) {
	first(s)
	report(s.t, s.r)
	unknownKey(s)
	if _, err := s.r.Delete(s.t.Context(), "user_1", true, 0, admin); err != nil {
		s.t.Fatal(err)
	}
	contestedPurge(s)
}

// ownedBy is a tenant as the ownership tag of the stray app names it.
func ownedBy(s *scene, id tenant.ID) string {
	sealed, err := s.w.Keys.SealOwner("t-stray", tenant.AppOwner{Tenant: id, Generation: 1, Profile: tenant.DefaultProfile})
	if err != nil {
		s.t.Fatal(err)
	}
	return sealed
}

// retag changes fields of an ownership tag by hand.
func retag(s *scene, app tenant.AppID, fields map[string]any) {
	askClarifai(s.t, s.w, "PATCH", "/apps/"+string(app), map[string]any{"action": "overwrite",
		"app": map[string]any{"metadata": map[string]any{"tenantry": fields}}, "metadata_action": map[string]any{"op": "merge"}})
}

// tagAnother changes the tag of the app of user_1 to another tenant.
func tagAnother(s *scene) {
	app := s.holds["user_1"]
	sealed, err := s.w.Keys.SealOwner(app, tenant.AppOwner{Tenant: "another", Generation: 1, Profile: tenant.DefaultProfile})
	if err != nil {
		s.t.Fatal(err)
	}
	retag(s, app, map[string]any{"tenant": sealed})
}

// decideOpen decides the findings of a kind that wait for a decision. It reports whether there
// were any, or a decision is not carried out yet.
func decideOpen(s *scene, kind tenant.FindingKind, choice tenant.RepairAction) bool {
	found, err := s.r.DB.Undecided(s.t.Context(), kind, tenant.Finding{}, 100)
	if err != nil {
		s.t.Fatal(err)
	}
	waits := false
	for _, f := range found {
		if f.State == tenant.FindingOpen {
			_, err := s.r.Decide(s.t.Context(), f.Number, "", choice, cmp.Or(string(f.TenantID), string(f.AppID)), admin)
			if err != nil && !errors.Is(err, tenant.Conflict) {
				s.t.Fatalf("decide %s of %+v: %v", choice, f, err)
			}
		}
		waits = waits || f.State == tenant.FindingOpen || f.State == tenant.FindingDecided
	}
	return waits
}

// decided decides the findings of a kind, unless they are decided, and waits until the decisions
// are carried out.
func decided(kind tenant.FindingKind, choice tenant.RepairAction) func(*scene) {
	return func(s *scene) {
		provisiontest.Eventually(s.t, fmt.Sprintf("it is decided: %s of %s", choice, kind), func() bool { return !decideOpen(s, kind, choice) })
	}
}

// startRepair carries out the last report.
func startRepair(s *scene) {
	last, err := s.r.DB.LastReport(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err = s.r.StartRepair(s.t.Context(), last.Token, admin); err != nil {
		s.t.Fatalf("start repair: %v", err)
	}
}

// reported has a difference, and a report that found it.
func reported(differ func(*scene)) func(*scene) {
	return func(s *scene) {
		first(s)
		differ(s)
		rest(s.t, s.w)
		if _, found := report(s.t, s.r); !slices.ContainsFunc(found, func(f tenant.Finding) bool { return f.Action != "" }) {
			s.t.Fatalf("the report found %+v; want something to repair", found)
		}
	}
}

// forgetSecond makes the database forget a second tenant, and returns its app.
func forgetSecond(s *scene) tenant.AppID {
	app := signUp(s.t, s.r, "user_2").AppID
	s.holds["user_2"] = app
	marked(s.t, s.w)
	exec(s.t, s.w, fmt.Sprintf(`
		BEGIN;
		SET LOCAL session_replication_role = replica;
		DELETE FROM keys WHERE app_id = '%[1]s';
		DELETE FROM tenants WHERE app_id = '%[1]s';
		DELETE FROM apps WHERE id = '%[1]s';
		COMMIT`, app))
	return app
}

// makeMarkedApp makes an app by hand that has our marker, with a sealed tenant.
func makeMarkedApp(s *scene, sealed string) {
	askClarifai(s.t, s.w, "POST", "/apps", map[string]any{"apps": []any{map[string]any{"id": "t-stray",
		"metadata": map[string]any{"tenantry": tenant.Marker{Deployment: s.r.Deployment.ID, App: "t-stray", Tenant: sealed}}}}})
}

func removeStray(s *scene) { askClarifai(s.t, s.w, "DELETE", "/apps/t-stray", nil) }

func unmark(s *scene, app tenant.AppID) {
	askClarifai(s.t, s.w, "PATCH", "/apps/"+string(app), map[string]any{"action": "overwrite",
		"app": map[string]any{"metadata": map[string]any{"mine": 1}}, "metadata_action": map[string]any{"op": "overwrite"}})
}

func removeKey(s *scene) {
	_, secret := keyOf(s.t, s.r, "user_1")
	askClarifai(s.t, s.w, "DELETE", "/keys/"+secret.Reveal(), nil)
}

func rescopeKey(s *scene) {
	_, secret := keyOf(s.t, s.r, "user_1")
	askClarifai(s.t, s.w, "PATCH", "/keys", map[string]any{"action": "overwrite",
		"keys": []any{map[string]any{"id": secret.Reveal(), "scopes": []string{"Predict"}}}})
}

// makeRevokedKey makes a key that lives though its row says that it does not.
func makeRevokedKey(s *scene) {
	exec(s.t, s.w, `INSERT INTO keys (id, app_id, name, scopes, state, revoked_at, updated_at)
		VALUES ($1, $2, 'old', '{All}', 'revoked', now() - interval '1 day', now() - interval '1 day')`, strayKey, s.holds["user_1"])
	makeKeyByHand(s.t, s.w, s.holds["user_1"], tenant.KeyMarker{Deployment: s.r.Deployment.ID, KeyID: strayKey}.String())
}

// revoking has a key that is to be revoked: one that is there or one that is not,
// with its secret or without.
func revoking(there, known bool) func(*scene) {
	return func(s *scene) {
		first(s)
		s.r.Stop()
		app := s.holds["user_1"]
		exec(s.t, s.w, `INSERT INTO keys (id, app_id, name, scopes, state, in_doubt_since)
			VALUES ($1, $2, 'old', '{All}', 'revoking', now() - interval '1 hour')`, strayKey, app)
		if !there {
			return
		}
		makeKeyByHand(s.t, s.w, app, tenant.KeyMarker{Deployment: s.r.Deployment.ID, KeyID: strayKey}.String())
		if !known {
			return
		}
		for _, k := range s.w.AppKeys() {
			if marker, ok := tenant.ParseKeyMarker(k.Description); ok && marker.KeyID == strayKey {
				secret := tenant.NewSecret(k.ID)
				sealed, err := s.w.Keys.Seal(strayKey, secret)
				if err != nil {
					s.t.Fatal(err)
				}
				exec(s.t, s.w, `UPDATE keys SET ciphertext = $2, fingerprint = $3, in_doubt_since = NULL WHERE id = $1`,
					strayKey, sealed, s.w.Keys.Fingerprint(secret))
			}
		}
	}
}

// fillPool has an app built that nobody waits for.
func fillPool(s *scene) {
	exec(s.t, s.w, `INSERT INTO apps (id, profile, profile_revision) VALUES ($1, 'default', 'x')`, poolApp)
	rest(s.t, s.w)
}
