// An agent in Go: serves topic "go" over vchan-http. The standard library alone.
//
//	vchan dev run --http 8779 go run agent.go       on a laptop
//	./agent http://127.0.0.1:8779 TOKEN             in a guest, beside vchan-http
//
// A cast is acknowledged before it is run: who does not get that far has not run it, and another
// gets it. A call is answered by "reply" alone.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

type request struct {
	Lease  string                     `json:"lease"`
	Kind   string                     `json:"kind"`
	Method string                     `json:"method"`
	Args   map[string]json.RawMessage `json:"args"`
}

var methods = map[string]func(args map[string]json.RawMessage) (any, error){
	"echo": func(args map[string]json.RawMessage) (any, error) { return args, nil },
	"shout": func(args map[string]json.RawMessage) (any, error) {
		var text string
		err := json.Unmarshal(args["text"], &text)
		return strings.ToUpper(text), err
	},
	"note": func(args map[string]json.RawMessage) (any, error) {
		fmt.Println(string(args["text"]))
		return nil, nil
	},
}

func argument(number int, variable string) string {
	if len(os.Args) > number {
		return os.Args[number]
	}
	return os.Getenv(variable)
}

func ask(verb string, members map[string]any, answer any) error {
	body, err := json.Marshal(members)
	if err != nil {
		return err
	}
	url := argument(1, "VCHAN_HTTP") + "/v1/" + verb
	asked, err := http.NewRequest("POST", url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	asked.Header.Set("Authorization", "Bearer "+argument(2, "VCHAN_HTTP_TOKEN"))
	response, err := http.DefaultClient.Do(asked)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s: %s %s", verb, response.Status, text)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

func run(asked request) error {
	isCall := asked.Kind == "call"
	if !isCall {
		if err := ask("ack", map[string]any{"lease": asked.Lease}, nil); err != nil {
			return err // it is somebody else's by now
		}
	}
	reply := map[string]any{"lease": asked.Lease}
	method, found := methods[asked.Method]
	if !found {
		reply["failure"] = map[string]any{"class": "NoSuchMethod", "message": asked.Method}
	} else if result, err := method(asked.Args); err != nil {
		reply["failure"] = map[string]any{"class": "Error", "message": err.Error()}
	} else {
		reply["result"] = result
	}
	if !isCall {
		return nil
	}
	return ask("reply", reply, nil)
}

func main() {
	for {
		var received struct{ Requests []request }
		wanted := map[string]any{"topics": []string{"go"}, "max": 8, "wait_s": 20}
		if err := ask("receive", wanted, &received); err != nil {
			fmt.Fprintln(os.Stderr, err) // vchan-http or vchan-guest is away
			time.Sleep(time.Second)
			continue
		}
		for _, asked := range received.Requests {
			if err := run(asked); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}
}
