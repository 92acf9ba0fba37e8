package clarifaisim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/go-chi/chi/v5"
)

// controlRoutes adds the control side. It meets no faults, no throttle and no
// latency, and its requests are not in the log.
func (s *Sim) controlRoutes(router *chi.Mux) {
	router.Route("/_sim", func(r chi.Router) {
		r.Get("/state", show(s.State))
		r.Get("/apps", show(s.Apps))
		r.Get("/keys", show(s.Keys))
		r.Get("/calls", show(s.Calls))
		r.Get("/faults", show(s.Faults))
		r.Post("/faults", control(s.postFaults, s.Faults))
		r.Get("/settings", show(s.Settings))
		r.Post("/settings", control(s.postSettings, s.Settings))
		r.Post("/reset", control(func([]byte) error { return s.Reset() }, s.State))
		r.NotFound(func(w http.ResponseWriter, r *http.Request) {
			writeControl(w, http.StatusNotFound, problem{"there are GET state, apps, keys, calls, faults, settings and POST faults, settings, reset below /_sim"})
		})
		r.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) {
			writeControl(w, http.StatusMethodNotAllowed, problem{"the path takes other methods"})
		})
	})
}

// A problem is how the control side refuses.
type problem struct {
	Error string `json:"error"`
}

func show[T any](get func() T) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { writeControl(w, http.StatusOK, get()) }
}

// control carries out a request of the control side, and answers with how things
// are after it.
func control[T any](do func(body []byte) error, get func() T) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err == nil {
			err = do(body)
		}
		if err != nil {
			writeControl(w, http.StatusBadRequest, problem{err.Error()})
			return
		}
		writeControl(w, http.StatusOK, get())
	}
}

func writeControl(w http.ResponseWriter, code int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("clarifaisim: %T cannot be answered: %v", v, err))
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n'))
}

// postFaults takes a list of rules, bare or as {"faults":[…]}.
func (s *Sim) postFaults(body []byte) error {
	list := json.RawMessage(bytes.TrimSpace(body))
	if bytes.HasPrefix(list, []byte("{")) {
		var wrapped struct {
			Faults json.RawMessage `json:"faults"`
		}
		if err := decodeStrictly(list, &wrapped); err != nil {
			return err
		}
		list = wrapped.Faults
	}
	if !bytes.HasPrefix(list, []byte("[")) {
		return errors.New(`give a list of fault rules, or {"faults":[…]}`)
	}
	var raw []json.RawMessage
	if err := decodeStrictly(list, &raw); err != nil {
		return err
	}
	faults := make([]Fault, len(raw))
	for i, r := range raw {
		if err := decodeStrictly(r, &faults[i]); err != nil {
			return fmt.Errorf("fault %d: %w", i+1, err)
		}
		// A 0 here would mean always: hardly what somebody wants who writes it.
		var given struct {
			Count, Probability *float64
		}
		_ = json.Unmarshal(r, &given)
		if given.Count != nil && *given.Count == 0 || given.Probability != nil && *given.Probability == 0 {
			return fmt.Errorf("fault %d: count or probability is 0: leave it out for always, leave the rule out for never", i+1)
		}
	}
	return s.SetFaults(faults)
}

// postSettings changes the settings that are given, and adds and removes PATs. An
// HTTP code of 0 in http_codes takes an override back.
func (s *Sim) postSettings(body []byte) error {
	var req struct {
		*Settings
		AddPATs    []PAT    `json:"add_pats"`
		RemovePATs []string `json:"remove_pats"`
	}
	settings := s.Settings()
	req.Settings = &settings
	if err := decodeStrictly(body, &req); err != nil {
		return err
	}
	for _, p := range req.AddPATs {
		if err := p.check(); err != nil {
			return err
		}
	}
	// Decoded again under the lock, so that two requests at once both count.
	if err := s.Update(func(now *Settings) {
		_ = json.Unmarshal(body, now)
		for code, http := range now.HTTPCodes {
			if http == 0 {
				delete(now.HTTPCodes, code)
			}
		}
	}); err != nil {
		return err
	}
	for _, token := range req.RemovePATs {
		s.RemovePAT(token)
	}
	for _, p := range req.AddPATs {
		if err := s.AddPAT(p); err != nil {
			return err
		}
	}
	return nil
}

// decodeStrictly refuses fields that there are not, and anything behind the value.
func decodeStrictly(data []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("the body is empty")
		}
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind the JSON value")
	}
	return nil
}
