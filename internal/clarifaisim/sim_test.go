package clarifaisim_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	acmePAT  = "11111111111111111111111111111111"
	otherPAT = "22222222222222222222222222222222"
)

// A fixture is a simulator behind a real listener. User acme has acmePAT, user
// other has otherPAT. There is no throttle.
type fixture struct {
	*clarifaisim.Sim
	t      *testing.T
	url    string
	client *http.Client
}

func newFixture(t *testing.T, edit ...func(*clarifaisim.Config)) *fixture {
	t.Helper()
	settings := clarifaisim.DefaultSettings()
	settings.RateLimit = 0
	cfg := clarifaisim.Config{
		PATs:     []clarifaisim.PAT{{Token: acmePAT, UserID: "acme"}, {Token: otherPAT, UserID: "other"}},
		Settings: &settings,
	}
	for _, e := range edit {
		e(&cfg)
	}
	sim, err := clarifaisim.New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	server := httptest.NewServer(sim)
	t.Cleanup(server.Close)
	t.Cleanup(func() { _ = sim.Close() }) // before the server, which waits for what hangs
	t.Cleanup(server.Client().CloseIdleConnections)
	return &fixture{Sim: sim, t: t, url: server.URL, client: server.Client()}
}

// in returns the fixture for use in a subtest.
func (f fixture) in(t *testing.T) *fixture {
	f.t = t
	return &f
}

func (f *fixture) update(edit func(*clarifaisim.Settings)) {
	f.t.Helper()
	if err := f.Update(edit); err != nil {
		f.t.Fatalf("Update: %v", err)
	}
}

func (f *fixture) faults(faults ...clarifaisim.Fault) {
	f.t.Helper()
	if err := f.SetFaults(faults); err != nil {
		f.t.Fatalf("SetFaults: %v", err)
	}
}

// A reply is an answer with what most tests look at.
type reply struct {
	http   int
	header http.Header
	text   string
	Status struct {
		Code           int    `json:"code"`
		Description    string `json:"description"`
		Details        string `json:"details"`
		ReqID          string `json:"req_id"`
		HTTPStatusCode int    `json:"http_status_code"`
		RedirectInfo   struct {
			NewResourceID string `json:"new_resource_id"`
		} `json:"redirect_info"`
	} `json:"status"`
	User struct{ ID string }
	App  testApp
	Apps []testApp
	Key  testKey
	Keys []testKey

	Scopes []string
	Inputs []struct{ ID string }
}

type testApp struct {
	ID, Description, Notes string
	Metadata               json.RawMessage
	Visibility             struct{ Gettable int }
	DefaultWorkflow        struct{ ID string }                   `json:"default_workflow"`
	ExtraInfo              struct{ Counts struct{ Inputs int } } `json:"extra_info"`
}

type testKey struct {
	ID, Description, Type string
	Scopes                []string
	Apps                  []struct {
		ID     string
		UserID string `json:"user_id"`
	}
}

// try sends a request with a credential, "" for none; the error is that of the
// connection.
func (f *fixture) try(secret, method, path, body string) (reply, error) {
	f.t.Helper()
	req, err := http.NewRequestWithContext(f.t.Context(), method, f.url+path, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	if secret != "" {
		req.Header.Set("Authorization", "Key "+secret)
	}
	return f.send(req)
}

func (f *fixture) send(req *http.Request) (reply, error) {
	f.t.Helper()
	// A redirect is an answer here.
	res, err := f.client.Transport.RoundTrip(req)
	if err != nil {
		return reply{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		return reply{}, err
	}
	r := reply{http: res.StatusCode, header: res.Header, text: string(data)}
	if strings.HasPrefix(res.Header.Get("Content-Type"), "application/json") && !strings.HasPrefix(req.URL.Path, "/_sim/") {
		if err := json.Unmarshal(data, &r); err != nil {
			f.t.Fatalf("%s %s: answer %s: %v", req.Method, req.URL.Path, data, err)
		}
	}
	return r, nil
}

func (f *fixture) do(secret, method, path, body string) reply {
	f.t.Helper()
	r, err := f.try(secret, method, path, body)
	if err != nil {
		f.t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

// want sends a request as acme's PAT and checks the status code of the answer.
func (f *fixture) want(code int, method, path, body string) reply {
	f.t.Helper()
	return f.wantAs(acmePAT, code, method, path, body)
}

func (f *fixture) wantAs(secret string, code int, method, path, body string) reply {
	f.t.Helper()
	r := f.do(secret, method, path, body)
	if r.Status.Code != code {
		f.t.Fatalf("%s %s: got code %d, HTTP %d, %s; want code %d", method, path, r.Status.Code, r.http, r.text, code)
	}
	return r
}

func (f *fixture) makeApp(id string) {
	f.t.Helper()
	f.want(10000, "POST", "/v2/users/acme/apps", fmt.Sprintf(`{"apps":[{"id":%q}]}`, id))
}

// makeKey makes a key with scopes, All if none are named.
func (f *fixture) makeKey(app string, scopes ...string) string {
	f.t.Helper()
	if len(scopes) == 0 {
		scopes = []string{"All"}
	}
	return f.want(10000, "POST", "/v2/users/acme/keys", keyBody(app, scopes...)).Keys[0].ID
}

func keyBody(app string, scopes ...string) string {
	list, _ := json.Marshal(scopes)
	return fmt.Sprintf(`{"keys":[{"description":"d","scopes":%s,"apps":[{"id":%q,"user_id":"acme"}]}]}`, list, app)
}

func appIDs(apps []testApp) []string {
	ids := []string{}
	for _, a := range apps {
		ids = append(ids, a.ID)
	}
	return ids
}

// control sends a request to the control side and decodes what it answers.
func (f *fixture) control(wantHTTP int, method, path, body string, into any) string {
	f.t.Helper()
	r := f.do("", method, "/_sim/"+path, body)
	if r.http != wantHTTP {
		f.t.Fatalf("%s /_sim/%s: got HTTP %d, %s; want %d", method, path, r.http, r.text, wantHTTP)
	}
	if into != nil {
		if err := json.Unmarshal([]byte(r.text), into); err != nil {
			f.t.Fatalf("%s /_sim/%s: answer %s: %v", method, path, r.text, err)
		}
	}
	return r.text
}
