package httpapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type batchItem struct {
	ID          *string           `json:"id"`
	Profile     *string           `json:"profile"`
	DisplayName *string           `json:"display_name"`
	Labels      map[string]string `json:"labels"`
}

type batchAnswer struct {
	Results []batchResult `json:"results"`
}

type batchResult struct {
	ID      tenant.ID       `json:"id,omitempty"`
	Status  int             `json:"status"`
	Created bool            `json:"created"`
	Tenant  *tenantBody     `json:"tenant,omitempty"`
	Problem *problemDetails `json:"problem,omitempty"`
}

func (s *server) postBatch(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	body, err := readBody(w, r, holdsItems, MaxBatchBytes)
	if err != nil {
		return err
	}
	items, rule, err := parseBatch(body)
	if err != nil {
		return err
	}
	ups := make([]provision.BatchSignUp, len(items))
	for i, raw := range items {
		ups[i] = parseBatchItem(raw)
	}
	ends, err := s.Service.SignUpMany(r.Context(), ups, rule, actorOf(r))
	if err != nil {
		return err
	}
	answer := batchAnswer{Results: make([]batchResult, len(ends))}
	for i, end := range ends {
		answer.Results[i] = s.batchResult(i, ups[i].ID, end, infoOf(r).id)
	}
	return respond(w, http.StatusOK, answer)
}

// parseBatch reads what holds the items, and leaves what they hold to parseBatchItem.
func parseBatch(body []byte) (items []json.RawMessage, rule provision.BatchRule, err error) {
	var fields map[string]json.RawMessage // that it is an object, or where the fault is
	if err := json.Unmarshal(body, &fields); err != nil {
		return nil, rule, bodyFault(err)
	}
	if fields == nil {
		return nil, rule, invalid("body", "is null, and must be an object")
	}
	seen := map[string]bool{}
	d := json.NewDecoder(bytes.NewReader(body))
	_, _ = d.Token() // which is the brace that begins it
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, rule, bodyFault(err)
		}
		name := token.(string)
		if seen[name] {
			return nil, rule, invalid("body", "gives one field twice")
		}
		seen[name] = true
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return nil, rule, bodyFault(err)
		}
		switch {
		case name == "tenants" && json.Unmarshal(raw, &items) != nil || string(raw) == "null":
			return nil, rule, invalid(name, "must be an array, of objects")
		case name == "tenants":
		case name == "dry_run" && json.Unmarshal(raw, &rule.DryRun) != nil:
			return nil, rule, invalid(name, "must be true or false")
		case name == "dry_run":
		case name == "on_deleted":
			var what string
			if json.Unmarshal(raw, &what) != nil || what != "refuse" {
				return nil, rule, invalid(name, "must be refuse, or left out")
			}
			rule.LeaveDeleted = true
		default:
			return nil, rule, unknown(name, "body", "a field", []string{"tenants", "dry_run", "on_deleted"})
		}
	}
	if len(items) < 1 || len(items) > MaxBatch {
		return nil, rule, invalid("tenants", "must have 1 to %d items, and has %d", MaxBatch, len(items))
	}
	return items, rule, nil
}

func parseBatchItem(raw json.RawMessage) provision.BatchSignUp {
	var item batchItem
	if err := decodeObject(raw, &item, holdsItems, "id", "profile", "display_name", "labels"); err != nil {
		return provision.BatchSignUp{Fault: err}
	}
	if item.ID == nil {
		return provision.BatchSignUp{Fault: invalid("id", "is missing")}
	}
	id, err := tenant.ParseID(*item.ID)
	if e, ok := errors.AsType[*tenant.Error](err); ok {
		e.Field = "id" // as it is named here
		return provision.BatchSignUp{Fault: e}
	}
	return provision.BatchSignUp{ID: id, SignUp: tenant.SignUp{Profile: item.Profile, DisplayName: item.DisplayName, Labels: item.Labels}}
}

func (s *server) batchResult(place int, id tenant.ID, end provision.BatchEnd, requestID string) batchResult {
	result := batchResult{ID: id, Status: http.StatusAccepted, Created: end.Created}
	if end.Err != nil {
		p, _ := problemOf(end.Err, requestID)
		at := fmt.Sprintf("tenants[%d]", place)
		switch p.Field {
		case "", "body":
			p.Field = at
		default:
			p.Field = at + "." + p.Field
		}
		result.Status, result.Problem = p.Status, &p
		return result
	}
	if end.Tenant.ID == "" { // it would be made
		return result
	}
	body := s.tenantBody(end.Tenant)
	result.Tenant = &body
	if end.Tenant.Settled() {
		result.Status = http.StatusOK
	}
	return result
}
