package clarifaisim

import (
	"encoding/json"
	"slices"
	"time"
)

// maxInputs is how many inputs an app can have: enough to see whose data is whose,
// and no more than a test machine holds.
const maxInputs = 10_000

// inputFields are the fields of an input in requests and answers.
type inputFields struct {
	ID        string          `json:"id,omitempty"`
	Data      json.RawMessage `json:"data,omitempty"`
	CreatedAt time.Time       `json:"created_at,omitzero"`
}

// postInputs stores inputs as they come. Nothing is fetched, indexed or understood.
func (s *Sim) postInputs(c *call) answer {
	var req struct {
		Inputs []*inputFields `json:"inputs"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.Inputs) == 0 || slices.Contains(req.Inputs, nil) {
		return refuse(codeInvalidRequest, "there is no input in the request")
	}
	if c.app.beingDeleted() {
		return noApp(c.app.App.ID)
	}
	if len(c.app.inputs)+len(req.Inputs) > maxInputs {
		return refuse(codeExceedsLimits, "the simulator keeps %d inputs in an app", maxInputs)
	}
	var changes []change
	taken := make(map[string]bool)
	for _, in := range req.Inputs {
		if in.ID == "" {
			in.ID = newSecret()
		}
		data, err := object(in.Data)
		if err != nil {
			return refuse(codeInvalidRequest, "data has to be an object")
		}
		if _, there := c.app.inputIDs[in.ID]; there || taken[in.ID] {
			return refuse(codeDuplicate, "input_id '%.64s'", in.ID)
		}
		taken[in.ID] = true
		in.Data, in.CreatedAt = data, c.now
		stored := input{ID: in.ID, Data: data, CreatedAt: c.now}
		changes = append(changes, change{PutInput: &newInput{App: c.app.ref(), Input: &stored}})
	}
	if s.commit(changes...) != nil {
		return s.saveFailed()
	}
	return ok(member{"inputs", req.Inputs})
}

// listInputs lists the inputs of one app, oldest first.
func (s *Sim) listInputs(c *call) answer {
	p, err := c.page()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	found := make([]inputFields, 0, p.size)
	for _, in := range cutPage(c.app.inputs, p) {
		found = append(found, inputFields(*in))
	}
	return ok(member{"inputs", found})
}

// simulated is what stands for every prediction, so that nobody takes it for one.
const simulated = "simulated by clarifaisim: no model was run"

// An output answers an input of a prediction.
type output struct {
	ID        string      `json:"id"`
	Status    status      `json:"status"`
	CreatedAt time.Time   `json:"created_at"`
	Model     outputModel `json:"model"`
	Input     inputFields `json:"input"`
	Data      outputData  `json:"data"`
}

type outputModel struct {
	ID     string `json:"id"`
	AppID  string `json:"app_id"`
	UserID string `json:"user_id"`
}

type outputData struct {
	Text struct {
		Raw string `json:"raw"`
	} `json:"text"`
	Metadata struct {
		Simulated bool `json:"simulated"`
	} `json:"metadata"`
}

// postModelOutputs answers for every model id, since apps hold no models here.
func (s *Sim) postModelOutputs(c *call) answer {
	var req struct {
		Inputs []*inputFields `json:"inputs"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.Inputs) == 0 || slices.Contains(req.Inputs, nil) {
		return refuse(codeInvalidRequest, "there is no input in the request")
	}
	outputs := make([]output, len(req.Inputs))
	for i, in := range req.Inputs {
		o := &outputs[i]
		*o = output{
			ID: newSecret(), Status: s.statusOf(statusByCode[codeSuccess]), CreatedAt: c.now,
			Model: outputModel{ID: c.params["model"], AppID: c.app.App.ID, UserID: c.user}, Input: *in,
		}
		o.Data.Text.Raw, o.Data.Metadata.Simulated = simulated, true
	}
	return ok(member{"outputs", outputs})
}
