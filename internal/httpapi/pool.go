package httpapi

import (
	"net/http"
	"time"
)

type poolListBody struct {
	Pools []poolBody `json:"pools"`
}

type poolBody struct {
	Profile        string           `json:"profile"`
	Min            int              `json:"min"`
	Max            int              `json:"max"`
	Target         int              `json:"target"`
	Ready          int              `json:"ready"`
	Outdated       int              `json:"outdated"`
	Retired        int              `json:"retired"`
	Building       int              `json:"building"`
	WaitingTenants int              `json:"waiting_tenants"`
	Importing      int              `json:"importing_tenants"`
	LastHour       poolLastHourBody `json:"last_hour"`
	PlannedAt      time.Time        `json:"planned_at,omitzero"`
	Reason         *poolReasonBody  `json:"reason,omitempty"`
}

type poolLastHourBody struct {
	SignUps int `json:"sign_ups"`
	Hits    int `json:"hits"`
	Misses  int `json:"misses"`
}

type poolReasonBody struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

func (s *server) listPools(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	pools, err := s.Service.Pools(r.Context())
	if err != nil {
		return err
	}
	body := poolListBody{Pools: []poolBody{}}
	for _, p := range pools {
		b := poolBody{Profile: p.Profile, Min: p.Fewest, Max: p.Most, Target: p.Target, Ready: p.Ready, Outdated: p.Outdated, Retired: p.Retired,
			Building: p.Building, WaitingTenants: p.Waiting, Importing: p.Importing, LastHour: poolLastHourBody{p.SignUps, p.Hits, p.Misses}, PlannedAt: p.PlannedAt.UTC()}
		if p.Reason != nil {
			b.Reason = &poolReasonBody{p.Reason.Code, p.Reason.Detail}
		}
		body.Pools = append(body.Pools, b)
	}
	return respond(w, http.StatusOK, body)
}
