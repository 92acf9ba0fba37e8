package clarifaisim

import (
	"slices"
	"strconv"

	"github.com/go-chi/chi/v5"
)

// An endpoint is a call of Clarifai's API: what it asks for, and what it does.
type endpoint struct {
	name   string // as in the API's definition
	method string
	paths  []string
	auth   authKind
	scopes []string
	// list is the field of the answer that is there even if it is empty, "" if none.
	list string
	// do carries the call out. The call is authorised, and mu is held.
	do func(*Sim, *call) answer
}

// endpoints are the calls that the simulator knows. The scopes of calls that want
// a PAT bind PATs with scopes.
var endpoints = []*endpoint{
	{name: "GetUser", method: "GET", paths: []string{"/v2/users/{user}"}, auth: patAuth, do: (*Sim).getUser},
	{name: "MyScopes", method: "GET", paths: []string{"/v2/myscopes", "/v2/my_scopes", "/v2/users/{user}/apps/{app}/myscopes"}, auth: keyAuth, list: "scopes", do: (*Sim).myScopes},
	{name: "MyScopesUser", method: "GET", paths: []string{"/v2/users/{user}/myscopes"}, auth: patAuth, list: "scopes", do: (*Sim).myScopes},
	{name: "MyScopesRoot", method: "GET", paths: []string{"/v2/myscopesroot"}, auth: patAuth, list: "scopes", do: (*Sim).myScopes},

	{name: "PostApps", method: "POST", paths: []string{"/v2/users/{user}/apps"}, auth: patAuth, scopes: []string{"Apps_Add", "Apps_Get", "Models_Get", "Workflows_Get", "Workflows_Add"}, list: "apps", do: (*Sim).postApps},
	{name: "ListApps", method: "GET", paths: []string{"/v2/users/{user}/apps", "/v2/apps"}, auth: patAuth, scopes: []string{"Apps_Get", "Workflows_Get"}, list: "apps", do: (*Sim).listApps},
	{name: "GetApp", method: "GET", paths: []string{"/v2/users/{user}/apps/{app}", "/v2/app"}, auth: keyAuth, scopes: []string{"Apps_Get", "Workflows_Get"}, do: (*Sim).getApp},
	{name: "PatchApp", method: "PATCH", paths: []string{"/v2/users/{user}/apps/{app}"}, auth: patAuth, scopes: []string{"Apps_Add", "Apps_Get"}, do: (*Sim).patchApp},
	{name: "PatchApps", method: "PATCH", paths: []string{"/v2/users/{user}/apps"}, auth: patAuth, scopes: []string{"Apps_Add", "Apps_Get"}, list: "apps", do: (*Sim).patchApps},
	{name: "PatchAppsIds", method: "PATCH", paths: []string{"/v2/users/{user}/apps/ids"}, auth: patAuth, scopes: []string{"Apps_Add", "Apps_Get"}, list: "apps", do: (*Sim).patchAppsIDs},
	{name: "DeleteApp", method: "DELETE", paths: []string{"/v2/users/{user}/apps/{app}"}, auth: patAuth, scopes: []string{"Apps_Add", "Apps_Delete", "Apps_Get", "Workflows_Get"}, do: (*Sim).deleteApp},

	{name: "PostKeys", method: "POST", paths: []string{"/v2/users/{user}/keys"}, auth: patAuth, scopes: []string{"Apps_Get", "Keys_Add", "Keys_Get"}, list: "keys", do: (*Sim).postKeys},
	{name: "ListKeys", method: "GET", paths: []string{"/v2/users/{user}/keys"}, auth: patAuth, scopes: []string{"Keys_Get"}, list: "keys", do: (*Sim).listKeys},
	{name: "ListAppKeys", method: "GET", paths: []string{"/v2/users/{user}/apps/{app}/keys"}, auth: patAuth, scopes: []string{"Apps_Get", "Keys_Get"}, list: "keys", do: (*Sim).listKeys},
	{name: "GetKey", method: "GET", paths: []string{"/v2/users/{user}/keys/{key}"}, auth: patAuth, scopes: []string{"Keys_Get"}, do: (*Sim).getKey},
	{name: "PatchKeys", method: "PATCH", paths: []string{"/v2/users/{user}/keys"}, auth: patAuth, scopes: []string{"Keys_Add", "Keys_Get"}, list: "keys", do: (*Sim).patchKeys},
	{name: "DeleteKey", method: "DELETE", paths: []string{"/v2/users/{user}/keys/{key}"}, auth: patAuth, scopes: []string{"Keys_Add", "Keys_Delete", "Keys_Get"}, do: (*Sim).deleteKey},

	{name: "PostInputs", method: "POST", paths: []string{"/v2/users/{user}/apps/{app}/inputs", "/v2/inputs"}, auth: keyAuth, scopes: []string{"Apps_Get", "Annotations_Add", "Annotations_Get", "Concepts_Get", "Inputs_Add", "Inputs_Get", "Models_Get", "Predict", "Workflows_Get"}, list: "inputs", do: (*Sim).postInputs},
	{name: "ListInputs", method: "GET", paths: []string{"/v2/users/{user}/apps/{app}/inputs", "/v2/inputs"}, auth: keyAuth, scopes: []string{"Apps_Get", "Annotations_Get", "Concepts_Get", "Inputs_Get"}, list: "inputs", do: (*Sim).listInputs},
	{name: "PostModelOutputs", method: "POST", paths: []string{"/v2/models/{model}/outputs", "/v2/users/{user}/apps/{app}/models/{model}/outputs"}, auth: keyAuth, scopes: []string{"Apps_Get", "Concepts_Get", "Models_Get", "Predict"}, list: "outputs", do: (*Sim).postModelOutputs},

	{name: "ListStatusCodes", method: "GET", paths: []string{"/v2/status_codes"}, list: "statuses", do: (*Sim).listStatusCodes},
	{name: "GetStatusCode", method: "GET", paths: []string{"/v2/status_codes/{code}"}, do: (*Sim).getStatusCode},
}

// Whatever Clarifai does not have.
var (
	unknownPath = &endpoint{name: callUnknown, do: func(*Sim, *call) answer {
		return refuse(codeDoesNotExist, "there is no such path. Check the url of your request.")
	}}
	unknownMethod = &endpoint{name: callUnknown, do: func(*Sim, *call) answer {
		return refuse(codeMethodNotAllowed, "the path takes other methods")
	}}
)

const callUnknown = "Unknown"

// callNames returns the names that a fault can have.
func callNames() []string {
	names := make([]string, len(endpoints))
	for i, e := range endpoints {
		names[i] = e.name
	}
	return names
}

func (s *Sim) routes() *chi.Mux {
	router := chi.NewRouter()
	for _, e := range endpoints {
		for _, path := range e.paths {
			router.Method(e.method, path, s.handler(e))
		}
	}
	s.controlRoutes(router)
	router.NotFound(s.handler(unknownPath))
	router.MethodNotAllowed(s.handler(unknownMethod))
	return router
}

func (s *Sim) getUser(c *call) answer {
	return ok(member{"user", map[string]string{"id": c.user}})
}

// myScopes answers the three calls that say what a credential may do.
func (s *Sim) myScopes(c *call) answer {
	if c.key == nil {
		scopes := c.pat.Scopes
		if len(scopes) == 0 {
			scopes = []string{"All"}
		}
		return ok(member{"scopes", scopes}, member{"endpoints", []string{}})
	}
	return ok(
		member{"scopes", append([]string{}, c.key.Scopes...)},
		member{"endpoints", append([]string{}, c.key.Endpoints...)},
		member{"app", c.app.App},
	)
}

func (s *Sim) listStatusCodes(*call) answer {
	list := make([]status, len(statusCodes))
	for i, sc := range statusCodes {
		list[i] = s.statusOf(sc)
	}
	return ok(member{"statuses", list})
}

func (s *Sim) statusOf(sc statusCode) status {
	return status{Code: sc.code, Description: sc.description, HTTPStatusCode: s.settings.httpFor(sc.code)}
}

// getStatusCode answers with the status that was asked for, and HTTP 200.
func (s *Sim) getStatusCode(c *call) answer {
	i := slices.IndexFunc(statusCodes, func(sc statusCode) bool { return strconv.Itoa(sc.code) == c.params["code"] })
	if i < 0 {
		return refuse(codeDoesNotExist, "there is no such status code")
	}
	a := ok()
	a.status = &statusCodes[i]
	return a
}
