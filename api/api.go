// Package api holds the contract: openapi.yaml, embedded. Package client, below
// it, is generated from it.
package api

import _ "embed"

//go:generate go tool -modfile=../tools.mod oapi-codegen -config client/config.yaml openapi.yaml

// OpenAPI is the text of openapi.yaml.
//
//go:embed openapi.yaml
var OpenAPI []byte
